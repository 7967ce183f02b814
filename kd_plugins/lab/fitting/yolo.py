"""Models of Ultralytics, built without data or training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from kd_plugins.distiller import Session, find_module
from kd_plugins.errors import DistillError, in_words
from kd_plugins.lab.fitting.trial import Pair
from kd_plugins.predictions import MaskPredictions, readable
from kd_plugins.teachers import ULTRALYTICS
from kd_plugins.teachers.run import RunOptions, load_teachers
from kd_plugins.yolo.callback import check_version, quiet, refuse_other_tasks
from kd_plugins.yolo.example import GREY, NOISE
from kd_plugins.yolo.heads import head_of, is_end_to_end, refuse_unsupported
from kd_plugins.yolo.host import UltralyticsHost
from kd_plugins.yolo.options import DistillOptions
from kd_plugins.yolo.task import CLASSIFICATION
from kd_plugins.yolo.teacher import class_count, find_teacher, input_channels

#: Pixels of a side.
SIDE = 256


def open_pair(student: str, teacher: str | None, checkpoint: str | None, folder: Path) -> Pair:
    """Build student and teacher.

    Args:
        student: ``.pt`` or ``.yaml``.
        teacher: The same; None: one like the student.
        checkpoint: Must be None: a ``.pt`` has its weights.
        folder: For what is written on the way.

    Raises:
        DistillError: One of them cannot be built.
    """
    check_version()
    if checkpoint is not None:
        raise DistillError('--teacher-checkpoint belongs to the config of a teacher; a .pt of Ultralytics has its own.')
    notes = ['no --teacher: tried with one like the student'] if teacher is None else []
    with quiet():
        model = _build(student, '--student').model
        model.train()
        file = str(folder / 'teacher.pt')
        if teacher is not None and teacher.endswith('.pt'):
            file = find_teacher(teacher)
        else:
            _build(student if teacher is None else teacher, '--teacher').save(file)
            notes += ['--teacher has no weights: tried with random ones'] if teacher is not None else []
        refuse_unsupported(model, 'student')
        host = UltralyticsHost(model)
        # Recipes that need them fit, whatever they are.
        host.counts = lambda: [1] * (class_count(model) or 0)
        head = head_of(model)
        loaded, _ = load_teachers({'': {'ultralytics': file}}, model, host, ULTRALYTICS)
        theirs = loaded['']
        masks = all(readable(h, MaskPredictions) for h in (head, find_module(theirs.model, theirs.head, 'teacher')))
    facts = dict(classifier=host.task is CLASSIFICATION, end_to_end=is_end_to_end(head), masks=masks)

    def read(recipe: str) -> RunOptions:
        return DistillOptions(file, recipe=recipe).expand(**facts)

    def refuse(session: Session) -> None:
        refuse_other_tasks(session, host)

    return Pair(
        student=model,
        teacher=theirs,
        host=host,
        task=host.task.name,
        batch=lambda images: (_pictures(model, images), None),
        classes=None,
        count=class_count(model),
        read=read,
        refuse=refuse,
        notes=notes,
    )


def _build(spec: str, where: str):
    from ultralytics import YOLO

    try:
        return YOLO(spec, verbose=False)
    except Exception as error:
        raise DistillError(f'{where} {spec!r} cannot be built: {in_words(error)}.') from error


def _pictures(model: nn.Module, images: int) -> Tensor:
    return GREY + NOISE * (torch.rand(images, input_channels(model), SIDE, SIDE) - 0.5)
