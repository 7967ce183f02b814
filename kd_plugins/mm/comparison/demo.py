"""The comparisons on the embedded digits that ``make demo`` runs: detection, segmentation and classification."""

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
        'det/digits_yolox_teacher',
        'det/digits_yolox_student',
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
        'seg/digits_fpn_teacher',
        'seg/digits_fpn_student',
        'Handwritten digits: a small Semantic FPN, plain and distilled',
        data,
        work_dir=Path(work_dir),
        seeds=seeds,
        recipes=recipes,
        jobs=jobs,
    )


def demo_classification(
    work_dir: str | os.PathLike = 'work_dirs/demo/cls',
    *,
    data: str | os.PathLike = 'data/digits',
    seeds: Sequence[int] = (0,),
    recipes: Sequence[str] = ('deit_soft', 'deit_hard', 'deit_token'),
    jobs: int | None = None,
) -> dict[str, Any]:
    """The same for single digits: a ResNet of timm teaches a tiny DeiT with a distillation token. See `demo`."""
    return _compare(
        'cls/digits_resnet_teacher',
        'cls/digits_deit_student',
        'Handwritten digits: a tiny DeiT, plain and distilled from a ResNet',
        data,
        work_dir=Path(work_dir),
        seeds=seeds,
        recipes=recipes,
        jobs=jobs,
    )


def demo_across_architectures(
    work_dir: str | os.PathLike = 'work_dirs/demo/cls_vit',
    *,
    data: str | os.PathLike = 'data/digits',
    seeds: Sequence[int] = (0,),
    recipes: Sequence[str] = ('kl', 'vit_feature'),
    jobs: int | None = None,
) -> dict[str, Any]:
    """The other way round: a vision transformer teaches a small ResNet. See `demo`."""
    return _compare(
        'cls/digits_vit_teacher',
        'cls/digits_resnet_student',
        'Handwritten digits: a small ResNet, plain and distilled from a vision transformer',
        data,
        work_dir=Path(work_dir),
        seeds=seeds,
        recipes=recipes,
        jobs=jobs,
    )


def _compare(teacher: str, student: str, title: str, data: str | os.PathLike, **settings: Any) -> dict[str, Any]:
    root = prepare_digits(data)
    os.environ['DIGITS_ROOT'] = f'{root.as_posix()}/'
    configs = dict(teacher=f'{CONFIGS / teacher}.py', student=f'{CONFIGS / student}.py')
    return compare(Comparison(**configs, title=title, **settings))
