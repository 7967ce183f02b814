"""The comparisons on the embedded digits that ``make demo`` runs: detection and semantic segmentation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_plugins.comparison.experiment import compare
from kd_plugins.data import prepare_digits
from kd_plugins.mm.comparison.experiment import Comparison

CONFIGS = Path(__file__).parents[3] / 'configs'


def demo(
    work_dir: str | os.PathLike = 'work_dirs/demo',
    *,
    data: str | os.PathLike = 'data/digits',
    seeds: Sequence[int] = (0,),
    recipes: Sequence[str] = ('yolo_logit',),
    jobs: int | None = None,
) -> dict[str, Any]:
    """Build the digits, train a YOLOX, train a narrower one plain and distilled, compare.

    Args:
        work_dir: Where everything but the data is written.
        data: Where the scenes are written, or reused.
        seeds: One pair of students each.
        recipes: Distilled arms.
        jobs: Trainings at once, see `Comparison`.

    Returns:
        The figures, see `compare`.
    """
    return _compare(
        CONFIGS / 'det' / 'digits_yolox',
        'Handwritten digits: a small YOLOX, plain and distilled',
        data,
        work_dir=Path(work_dir),
        seeds=seeds,
        recipes=recipes,
        jobs=jobs,
    )


def demo_segmentation(
    work_dir: str | os.PathLike = 'work_dirs/demo/seg',
    *,
    data: str | os.PathLike = 'data/digits',
    seeds: Sequence[int] = (0,),
    recipes: Sequence[str] = ('pixel_kl', 'cwd'),
    jobs: int | None = None,
) -> dict[str, Any]:
    """The same for semantic segmentation: a Semantic FPN of mmseg labels every pixel. See `demo`."""
    return _compare(
        CONFIGS / 'seg' / 'digits_fpn',
        'Handwritten digits: a small Semantic FPN, plain and distilled',
        data,
        work_dir=Path(work_dir),
        seeds=seeds,
        recipes=recipes,
        jobs=jobs,
    )


def _compare(pair: Path, title: str, data: str | os.PathLike, **settings: Any) -> dict[str, Any]:
    root = prepare_digits(data)
    os.environ['DIGITS_ROOT'] = f'{root.as_posix()}/'
    return compare(Comparison(teacher=f'{pair}_teacher.py', student=f'{pair}_student.py', title=title, **settings))
