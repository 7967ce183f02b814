"""Ultralytics' results.csv of a run that is resumed with distillation, or without: its rows are to fit their header."""

from __future__ import annotations

import csv
from pathlib import Path

#: Columns of distillation begin with one of these.
COLUMNS = ('train/kd', 'val/kd')
#: The log before, as it was.
DISTILLED, PLAIN = 'results_distilled.csv', 'results_plain.csv'


def drop_columns(file: Path) -> None:
    """Take the columns of distillation out of a results.csv, which Ultralytics would go on to fill with others' values.

    Args:
        file: The results.csv; it is kept as it was under another name.
    """
    if not file.is_file():
        return
    text = file.read_text(encoding='utf-8')
    rows = list(csv.reader(text.splitlines()))
    kept = [i for i, name in enumerate(rows[0]) if not name.strip().startswith(COLUMNS)] if rows else []
    if not rows or len(kept) == len(rows[0]):
        return
    file.with_name(DISTILLED).write_text(text, encoding='utf-8')
    lines = (','.join(row[i] for i in kept if i < len(row)) for row in rows)
    file.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def begin_columns(file: Path) -> None:
    """Set a results.csv of a plain run aside, whose header has no columns for what is distilled from here on.

    Args:
        file: The results.csv.
    """
    if not file.is_file():
        return
    with file.open(encoding='utf-8') as lines:
        names = lines.readline().split(',')
    if not any(name.strip().startswith(COLUMNS) for name in names):
        file.replace(file.with_name(PLAIN))
