"""The comparison on the embedded digits in Ultralytics: the second half of ``make demo``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_plugins.lab.comparison.experiment import compare
from kd_plugins.lab.comparison.yolo.experiment import DEFAULT, NATIVE, Comparison
from kd_plugins.lab.data import prepare_digits

TEACHER = 'yolo11n.yaml'
#: Width of the student's channels, as a fraction of YOLO11's; n has 0.25.
WIDTH = 0.125
#: A short schedule from scratch: an optimizer step per batch (nbs), no mosaic of scenes that are already full, and no
#: mirrored digits.
OPTIONS = (
    'imgsz=128',
    'batch=16',
    'nbs=16',
    'optimizer=AdamW',
    'lr0=0.003',
    'warmup_epochs=1.0',
    'mosaic=0.0',
    'fliplr=0.0',
    'workers=1',
    'plots=False',
    'verbose=False',
)
EPOCHS = 10
#: Of the short tour, the teacher's too: scenes as they are, which are learned in half the time, and one validation at
#: the end. Of models that are hardly trained it spends most of its time on thousands of boxes that nobody would show:
#: without the faintest of them (conf) it measures 0.1 points less. What the table shows is measured with all.
SHORT = (*OPTIONS, 'scale=0.0', 'translate=0.0', 'hsv_h=0.0', 'hsv_s=0.0', 'hsv_v=0.0', 'val=False', 'conf=0.005')
#: As little training as the gain can still be seen after: a teacher that saw fewer scenes teaches half as much.
SHORT_EPOCHS = dict(teacher=4, student=4)
SHORT_STUDENT = ('fraction=0.92',)


def demo(work_dir: str | os.PathLike = 'work_dirs/demo/yolo', **options: Any) -> dict[str, Any]:
    """Build the digits, train a YOLO11n and a smaller YOLO11: plain, natively distilled, distilled; see `planned`."""
    return compare(planned(work_dir, **options))


def planned(
    work_dir: str | os.PathLike,
    *,
    data: str | os.PathLike = 'data/digits',
    seeds: Sequence[int] = (0,),
    recipes: Sequence[str] = (),
    jobs: int | None = None,
    short: bool = False,
) -> Comparison:
    """A YOLO11n on the digits, and a much smaller YOLO11 of several kinds; the digits are built now.

    Args:
        work_dir: Where everything but the data is written.
        data: Where the scenes are written, or reused.
        seeds: One student of each kind per seed.
        recipes: Distilled students, see `Comparison`. Default: natively distilled, and distilled; in short the latter.
        jobs: Trainings at once, see `Comparison`.
        short: Train by `SHORT`.
    """
    root = prepare_digits(data)
    work_dir = Path(work_dir).absolute()
    epochs = SHORT_EPOCHS if short else dict(teacher=EPOCHS, student=EPOCHS)
    options = SHORT if short else OPTIONS
    return Comparison(
        teacher=TEACHER,
        student=write_student(work_dir / 'yolo11_narrow.yaml'),
        data=str(root / 'digits.yaml'),
        recipes=recipes or ((DEFAULT,) if short else (NATIVE, DEFAULT)),
        work_dir=work_dir,
        seeds=seeds,
        student_options=(f'epochs={epochs["student"]}', *options, *(SHORT_STUDENT if short else ())),
        teacher_options=(f'epochs={epochs["teacher"]}', *options),
        jobs=jobs,
        title='Handwritten digits: a narrow YOLO11 in Ultralytics, plain and distilled',
    )


def write_student(path: Path, width: float = WIDTH) -> str:
    """Write a model YAML of YOLO11 that is narrower than any official one.

    Args:
        path: File to write.
        width: Of its channels, 0.25 is YOLO11n's.

    Returns:
        The path.
    """
    from ultralytics.nn.tasks import yaml_model_load
    from ultralytics.utils import YAML

    model = yaml_model_load(TEACHER)
    depth, _, most = model['scales']['n']
    model = {k: v for k, v in model.items() if k not in ('scale', 'yaml_file')}
    model['scales'] = {'narrow': [depth, width, most]}
    path.parent.mkdir(parents=True, exist_ok=True)
    YAML.save(path, model)
    return str(path)
