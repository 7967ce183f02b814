"""The end of a distilled run of Ultralytics, whose own best.pt already is the plain student."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kd_plugins.distiller.ending import Best, Ending, Student, numbers_of, shorter
from kd_plugins.yolo.run import Run


def ending_of(trainer: Any, run: Run, teacher: float | None = None, teacher_on: str = '') -> Ending:
    """What came out of a run.

    Args:
        trainer: The trainer, after its final evaluation of the best model.
        run: What was distilled.
        teacher: The teacher's value of the compared metric, where it is known.
        teacher_on: Which images it was measured on, in words, where these were not all.
    """
    # Ultralytics keeps the best and the last, strips both, and has measured the best again when it calls this.
    found = next(((path, name) for path, name in _files(trainer) if path.is_file()), None)
    stopper = getattr(trainer, 'stopper', None)
    at = getattr(stopper, 'best_epoch', 0) or None
    metrics = {k: v for k, v in numbers_of(trainer.metrics or {}).items() if not k.startswith('val/')}
    if trainer.best_fitness is not None:
        metrics = {'fitness': float(trainer.best_fitness), **metrics}
    best = Best(metrics, at) if metrics and trainer.best_fitness is not None else None
    notes = []
    if found is None:
        notes.append('no student was written: the run has save=False')
    if trainer.start_epoch:
        notes.append(f'KD share and time are those since epoch {trainer.start_epoch}, where the run was resumed')
    return Ending(
        name=str(trainer.args.model),
        unit='epoch',
        total=trainer.epoch + 1,
        seconds=time.time() - trainer.train_time_start,
        share=run.session.share,
        asked=run.session.asked,
        teachers=run.session.stopwatch.medians(),
        best=best,
        teacher=teacher,
        teacher_on=teacher_on,
        student=None if found is None else _student(trainer, *found),
        notes=tuple(notes),
        folder=shorter(trainer.save_dir),
    )


def _files(trainer: Any) -> list[tuple[Path, str]]:
    return [(Path(trainer.best), 'best epoch'), (Path(trainer.last), 'last epoch')]


def _student(trainer: Any, path: Path, source: str) -> Student:
    file = shorter(path)
    return Student(
        path=file,
        source=source,
        holds="weights, class names and the run's arguments; Ultralytics loads it without kd_plugins",
        commands={
            'test': f'yolo val model={file} data={trainer.args.data}',
            'use': f'yolo predict model={file} source=image.jpg',
            'export': f'yolo export model={file} format=onnx',
        },
    )
