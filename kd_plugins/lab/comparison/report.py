"""The report of one or several comparisons: one HTML page with pictures beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_plugins.lab.comparison.figures import Picture, draw_curves
from kd_plugins.lab.comparison.history import History
from kd_plugins.lab.comparison.table import (
    JOINT,
    Arm,
    Groups,
    Metrics,
    header,
    joint_rows,
    joint_verdicts,
    rows,
    seed_rows,
    verdicts,
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.25rem; margin-top: 2.5rem } h3 { font-size: 1.05rem; margin-top: 1.6rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #d9dee4; white-space: nowrap }
.left { text-align: left }
th { color: #52606d; font-weight: 600 }
img { max-width: 100%; height: auto } .note { color: #52606d; font-size: .9rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem } dt { color: #52606d } dd { margin: 0 }
""".strip()


@dataclass(frozen=True)
class Section:
    """A comparison in a report.

    Attributes:
        name: Among others; empty when it is the only one.
        teacher: Row of the teacher.
        plain: Row of the plain student.
        distilled: Rows of the distilled students.
        histories: Training logs by row, one per seed.
        metrics: What the models are compared by.
        metric: Key of the first of them in the validation lines.
        picture: What the models of the first seed found in some images; None: no such picture.
        note: How the columns of the table were measured.
        facts: What was run, for its end.
        step: What the seconds in the table are for, see `kd_plugins.lab.comparison.table.header`.
        unit: What the training is counted in, for the curves.
    """

    name: str
    teacher: Arm
    plain: Arm
    distilled: Sequence[Arm]
    histories: Mapping[str, Sequence[History]]
    metrics: Metrics
    metric: str
    picture: Picture | None
    note: str
    facts: Mapping[str, str]
    step: str = 'iter'
    unit: str = 'epoch'


def write_report(folder: Path, title: str, sections: Sequence[Section], groups: Groups | None = None) -> Path:
    """Write ``report.html``, and the curves and pictures of every section.

    Args:
        folder: Where to.
        title: Headline.
        sections: Comparisons, one after the other.
        groups: Rows of one table of all, which comes first. Default: no such table.

    Returns:
        The page.
    """
    parts = [f'<h1>{html.escape(title)}</h1>']
    if groups is not None:
        parts.append(_table(JOINT, joint_rows(groups), left=2))
        parts += [f'<p>{html.escape(sentence)}</p>' for sentence in joint_verdicts(groups)]
    for section in sections:
        parts += _section(folder, section)
    page = folder / 'report.html'
    page.write_text(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<style>\n{STYLE}\n</style>\n' + '\n'.join(parts) + '\n</html>\n'
    )
    return page


def _section(folder: Path, section: Section) -> list[str]:
    teacher, plain, distilled, metrics = section.teacher, section.plain, section.distilled, section.metrics
    prefix = f'{re.sub("[^a-z0-9]+", "_", section.name.lower())}_' if section.name else ''
    curves = f'{prefix}curves.png'
    draw_curves(folder / curves, section.histories, teacher.results[0].main, section.metric, metrics.main, section.unit)
    parts = [f'<h2>{html.escape(section.name)}</h2>'] if section.name else []
    parts += [
        _table(header(metrics, section.step), rows(teacher, plain, distilled)),
        f'<p class="note">{html.escape(section.note)}</p>',
        *(f'<p>{html.escape(sentence)}</p>' for sentence in verdicts(teacher, plain, distilled, metrics.main)),
    ]
    if len(plain.results) > 1:
        parts += _per_seed(plain, distilled, metrics)
    alt = f'loss and {metrics.main} over the {section.unit}s'
    parts += ['<h3>Training</h3>', f'<img src="{curves}" alt="{html.escape(alt)}">']
    if section.picture is not None:
        parts += _drawn(folder, section.picture, plain.results[0].seed, prefix)
    items = ''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>' for k, v in section.facts.items())
    return [*parts, '<h3>What was run</h3>', f'<dl>{items}</dl>']


def _per_seed(plain: Arm, distilled: Sequence[Arm], metrics: Metrics) -> list[str]:
    return [
        '<h3>Per seed</h3>',
        _table(*seed_rows(plain, distilled)),
        f'<p class="note">{metrics.main}, and in brackets the gain over the plain student of the same seed. '
        '± is the standard deviation over the seeds.</p>',
    ]


def _drawn(folder: Path, picture: Picture, seed: int, prefix: str) -> list[str]:
    file = f'{prefix}{picture.name}.png'
    picture.draw(folder / file)
    return [
        f'<h3>{picture.name.capitalize()}</h3>',
        f'<img src="{file}" alt="{html.escape(picture.alt)}">',
        f'<p class="note">Seed {seed}, {html.escape(picture.content)}. '
        f'{html.escape(picture.chosen)}: {html.escape(", ".join(map(str, picture.images)))}.</p>',
    ]


def _table(header: Sequence[str], cells: Sequence[Sequence[str]], left: int = 1) -> str:
    def row(line: Sequence[str], tag: str) -> str:
        sides = (' class="left"' if i < left else '' for i in range(len(line)))
        return ''.join(f'<{tag}{side}>{html.escape(c)}</{tag}>' for c, side in zip(line, sides, strict=True))

    body = '\n'.join(f'<tr>{row(line, "td")}</tr>' for line in cells)
    return f'<table>\n<tr>{row(header, "th")}</tr>\n{body}\n</table>'
