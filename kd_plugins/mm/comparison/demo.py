"""The comparison on the embedded digits: what ``make demo`` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_plugins.comparison.experiment import compare
from kd_plugins.data import prepare_digits
from kd_plugins.mm.comparison.experiment import Comparison

CONFIGS = Path(__file__).parents[3] / 'configs'
TEACHER, STUDENT = CONFIGS / 'det' / 'digits_yolox_teacher.py', CONFIGS / 'det' / 'digits_yolox_student.py'
RECIPE = 'yolo_logit'


def demo(
    work_dir: str | os.PathLike = 'work_dirs/demo',
    *,
    data: str | os.PathLike = 'data/digits',
    seeds: Sequence[int] = (0,),
    recipes: Sequence[str] = (RECIPE,),
    jobs: int | None = None,
) -> dict[str, Any]:
    """Build the digits, train a teacher, train the same student plain and distilled, compare.

    Args:
        work_dir: Where everything but the data is written.
        data: Where the scenes are written, or reused.
        seeds: One pair of students each.
        recipes: Distilled arms.
        jobs: Trainings at once, see `Comparison`.

    Returns:
        The figures, see `compare`.
    """
    root = prepare_digits(data)
    os.environ['DIGITS_ROOT'] = f'{root.as_posix()}/'
    return compare(
        Comparison(
            teacher=str(TEACHER),
            student=str(STUDENT),
            recipes=recipes,
            work_dir=Path(work_dir),
            seeds=seeds,
            jobs=jobs,
            title='Handwritten digits: a small YOLOX, plain and distilled',
        )
    )
