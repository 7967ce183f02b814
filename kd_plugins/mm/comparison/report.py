"""The report of a comparison: one HTML page with two pictures beside it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS

from kd_plugins.mm.comparison.figures import (
    SCORE,
    choose_images,
    draw_curves,
    draw_detections,
    read_ground_truth,
    read_predictions,
)
from kd_plugins.mm.comparison.logs import History
from kd_plugins.mm.comparison.table import HEADER, Arm, rows, seed_rows, verdict

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
    detections: Mapping[str, Path],
    dataset: Mapping[str, Any],
    scenes: int,
    facts: Mapping[str, str],
) -> Path:
    """Write ``report.html``, ``curves.png`` and, for COCO files, ``detections.png``.

    Args:
        folder: Where to.
        title: Headline.
        teacher: Row of the teacher.
        plain: Row of the plain student.
        distilled: Rows of the distilled students.
        histories: Training logs by row, one per seed.
        detections: Files of detections by row, of the first seed.
        dataset: The test set's config, for ground truth and class names.
        scenes: Images in the picture.
        facts: What was run, for the end of the page.

    Returns:
        The page.
    """
    metric = next(
        (
            k
            for runs in histories.values()
            for h in runs
            for line in h.val.values()
            for k in line
            if k.endswith('bbox_mAP')
        ),
        'coco/bbox_mAP',
    )
    draw_curves(folder / 'curves.png', histories, teacher.results[0].map, metric)
    parts = [
        f'<h1>{html.escape(title)}</h1>',
        _table(HEADER, rows(teacher, plain, distilled)),
        '<p class="note">mAP, AP50 and gain in points (100 × COCO AP), measured by <code>tools/test.py</code> on the '
        'last checkpoint. s/iter: median seconds per training iteration, data loading included. '
        'Checkpoints include the optimizer and EMA states.</p>',
        *(f'<p>{html.escape(verdict(plain, arm))}</p>' for arm in distilled),
    ]
    if len(plain.results) > 1:
        parts += [
            '<h2>Per seed</h2>',
            _table(*seed_rows(plain, distilled)),
            '<p class="note">mAP, and in brackets the gain over the plain student of the same seed. '
            '± is the standard deviation over the seeds.</p>',
        ]
    parts += ['<h2>Training</h2>', '<img src="curves.png" alt="loss and mAP over the epochs">']
    chosen = _picture(folder / 'detections.png', detections, dataset, scenes)
    if chosen:
        parts += [
            '<h2>Detections</h2>',
            '<img src="detections.png" alt="ground truth, teacher, plain and distilled student side by side">',
            f'<p class="note">Seed {plain.results[0].seed}, detections with a score of at least {SCORE:g} (numbers: '
            f'class, score in %). Images at even distances through the validation set, picked before any '
            f'detection was seen: ids {", ".join(map(str, chosen))}.</p>',
        ]
    items = ''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>' for k, v in facts.items())
    parts += ['<h2>What was run</h2>', f'<dl>{items}</dl>']
    page = folder / 'report.html'
    page.write_text(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<style>\n{STYLE}\n</style>\n' + '\n'.join(parts) + '\n</html>\n'
    )
    return page


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = ''.join(f'<th>{html.escape(c)}</th>' for c in header)
    body = '\n'.join('<tr>' + ''.join(f'<td>{html.escape(c)}</td>' for c in line) + '</tr>' for line in cells)
    return f'<table>\n<tr>{head}</tr>\n{body}\n</table>'


def _picture(path: Path, files: Mapping[str, Path], dataset: Mapping[str, Any], scenes: int) -> list[int]:
    """Draw the detections; returns the ids of the images, none where the ground truth is no COCO file."""
    annotations = Path(dataset.get('data_root') or '', dataset.get('ann_file') or '')
    if annotations.suffix != '.json' or not annotations.is_file():
        return []
    names = (dataset.get('metainfo') or {}).get('classes') or DATASETS.get(dataset['type']).METAINFO['classes']
    classes = (names,) if isinstance(names, str) else tuple(names)
    truth = read_ground_truth(annotations, classes)
    columns = {name: read_predictions(file) for name, file in files.items()}
    known = set.intersection(*(set(c) for c in columns.values()))
    images = choose_images({k: v for k, v in truth.items() if k in known}, scenes)
    if images:
        draw_detections(path, truth, columns, images, classes)
    return images
