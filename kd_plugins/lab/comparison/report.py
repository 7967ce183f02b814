"""The report of a comparison: one HTML page with two pictures beside it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_plugins.lab.comparison.figures import Picture, draw_curves
from kd_plugins.lab.comparison.history import History
from kd_plugins.lab.comparison.table import Arm, Metrics, header, rows, seed_rows, verdict

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #d9dee4; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
th { color: #52606d; font-weight: 600 }
img { max-width: 100%; height: auto } .note { color: #52606d; font-size: .9rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem } dt { color: #52606d } dd { margin: 0 }
""".strip()


def write_report(
    folder: Path,
    *,
    title: str,
    teacher: Arm,
    plain: Arm,
    distilled: Sequence[Arm],
    histories: Mapping[str, Sequence[History]],
    metrics: Metrics,
    metric: str,
    picture: Picture | None,
    note: str,
    facts: Mapping[str, str],
    step: str = 'iter',
    unit: str = 'epoch',
) -> Path:
    """Write ``report.html``, ``curves.png`` and the picture.

    Args:
        folder: Where to.
        title: Headline.
        teacher: Row of the teacher.
        plain: Row of the plain student.
        distilled: Rows of the distilled students.
        histories: Training logs by row, one per seed.
        metrics: What the models are compared by.
        metric: Key of the first of them in the validation lines.
        picture: What the models of the first seed found in some images; None: no such picture.
        note: How the columns of the table were measured.
        facts: What was run, for the end of the page.
        step: What the seconds in the table are for, see `kd_plugins.lab.comparison.table.header`.
        unit: What the training is counted in, for the curves.

    Returns:
        The page.
    """
    draw_curves(folder / 'curves.png', histories, teacher.results[0].main, metric, metrics.main, unit)
    parts = [
        f'<h1>{html.escape(title)}</h1>',
        _table(header(metrics, step), rows(teacher, plain, distilled)),
        f'<p class="note">{html.escape(note)}</p>',
        *(f'<p>{html.escape(verdict(plain, arm, metrics.main))}</p>' for arm in distilled),
    ]
    if len(plain.results) > 1:
        parts += _per_seed(plain, distilled, metrics)
    alt = f'loss and {metrics.main} over the {unit}s'
    parts += ['<h2>Training</h2>', f'<img src="curves.png" alt="{html.escape(alt)}">']
    if picture is not None:
        parts += _drawn(folder, picture, plain.results[0].seed)
    items = ''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>' for k, v in facts.items())
    parts += ['<h2>What was run</h2>', f'<dl>{items}</dl>']
    page = folder / 'report.html'
    page.write_text(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<style>\n{STYLE}\n</style>\n' + '\n'.join(parts) + '\n</html>\n'
    )
    return page


def _per_seed(plain: Arm, distilled: Sequence[Arm], metrics: Metrics) -> list[str]:
    return [
        '<h2>Per seed</h2>',
        _table(*seed_rows(plain, distilled)),
        f'<p class="note">{metrics.main}, and in brackets the gain over the plain student of the same seed. '
        '± is the standard deviation over the seeds.</p>',
    ]


def _drawn(folder: Path, picture: Picture, seed: int) -> list[str]:
    file = f'{picture.name}.png'
    picture.draw(folder / file)
    return [
        f'<h2>{picture.name.capitalize()}</h2>',
        f'<img src="{file}" alt="{html.escape(picture.alt)}">',
        f'<p class="note">Seed {seed}, {html.escape(picture.content)}. '
        f'{html.escape(picture.chosen)}: {html.escape(", ".join(map(str, picture.images)))}.</p>',
    ]


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = ''.join(f'<th>{html.escape(c)}</th>' for c in header)
    body = '\n'.join('<tr>' + ''.join(f'<td>{html.escape(c)}</td>' for c in line) + '</tr>' for line in cells)
    return f'<table>\n<tr>{head}</tr>\n{body}\n</table>'
