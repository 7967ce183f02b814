"""The comparisons on the embedded digits that ``make demo`` runs: detection, segmentation and classification."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugins.config_files import resolve_config
from kd_plugins.errors import DistillError, nearest
from kd_plugins.lab.comparison.experiment import compare
from kd_plugins.lab.comparison.mm.experiment import Comparison
from kd_plugins.lab.data import prepare_digits


@dataclass(frozen=True)
class Part:
    """A pair of models on the digits.

    Attributes:
        title: Of the report.
        teacher: Its config, below ``configs``.
        student: Its config.
        recipes: Distilled arms.
    """

    title: str
    teacher: str
    student: str
    recipes: tuple[str, ...]


PARTS = {
    'detection': Part(
        'Handwritten digits: a small YOLOX, plain and distilled',
        'det/digits_yolox_teacher.py',
        'det/digits_yolox_student.py',
        ('yolo_logit',),
    ),
    'segmentation': Part(
        'Handwritten digits: a small Semantic FPN, plain and distilled',
        'seg/digits_fpn_teacher.py',
        'seg/digits_fpn_student.py',
        ('pixel_kl', 'cwd'),
    ),
    'classification': Part(
        'Handwritten digits: a tiny DeiT, plain and distilled from a ResNet',
        'cls/digits_resnet_teacher.py',
        'cls/digits_deit_student.py',
        ('deit_soft', 'deit_hard', 'deit_token'),
    ),
    'across architectures': Part(
        'Handwritten digits: a small ResNet, plain and distilled from a vision transformer',
        'cls/digits_vit_teacher.py',
        'cls/digits_resnet_student.py',
        ('kl', 'vit_feature'),
    ),
}


def demo(work_dir: str | os.PathLike = 'work_dirs/demo', **options: Any) -> dict[str, Any]:
    """Build the digits, train a teacher, train a smaller model plain and distilled, compare; see `planned`."""
    return compare(planned(work_dir, **options))


def planned(
    work_dir: str | os.PathLike,
    *,
    part: str = 'detection',
    data: str | os.PathLike = 'data/digits',
    seeds: Sequence[int] = (0,),
    recipes: Sequence[str] = (),
    jobs: int | None = None,
) -> Comparison:
    """A teacher on the digits, and a smaller model plain and distilled; the digits are built now.

    Args:
        work_dir: Where everything but the data is written.
        part: One of `PARTS`.
        data: Where the scenes are written, or reused.
        seeds: One plain and one distilled student of every kind each.
        recipes: Distilled arms. Default: those of the part.
        jobs: Trainings at once, see `Comparison`.

    Raises:
        DistillError: There is no such part.
    """
    if part not in PARTS:
        raise DistillError(f'The demo has no part {part!r}; {nearest(part, PARTS)}')
    found = PARTS[part]
    root = prepare_digits(data)
    os.environ['DIGITS_ROOT'] = f'{root.as_posix()}/'
    return Comparison(
        teacher=resolve_config(f'kd_plugins::{found.teacher}'),
        student=resolve_config(f'kd_plugins::{found.student}'),
        title=found.title,
        work_dir=Path(work_dir),
        seeds=seeds,
        recipes=recipes or found.recipes,
        jobs=jobs,
    )
