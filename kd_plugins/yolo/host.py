"""Ultralytics as the engine sees it: its models, the labels of a batch, and how its losses are scaled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller import Host, Tap, Teacher
from kd_plugins.yolo.heads import BRANCHES, head_path
from kd_plugins.yolo.taps import ultralytics_tap
from kd_plugins.yolo.task import task_of


class UltralyticsHost(Host):
    """A student in Ultralytics' trainer.

    Args:
        student: The unwrapped student.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.task = task_of(student)

    def tap(self, student: nn.Module, tap: Tap) -> Tap:
        return ultralytics_tap(student, tap, 'student')

    def part(self, student: nn.Module, name: str) -> list[nn.Module]:
        layers, end = list(student.model), len((getattr(student, 'yaml', None) or {}).get('backbone') or ())
        parts = {'backbone': layers[:end], 'neck': layers[end:-1], 'head': layers[-1:]}
        return parts[name] if parts.get(name) else super().part(student, name)

    def head(self, student: nn.Module) -> str:
        return head_path(student)

    def targets(self, inputs: Any, samples: Any) -> Tensor | None:
        return self.task.targets(inputs, samples)

    def for_teacher(self, inputs: Any) -> Any:
        kind = inputs.device.type
        # Autocast would cast the frozen float32 weights anew in every forward: it caches trainable ones only.
        return inputs.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else inputs

    def match_memory_format(self, teacher: Teacher) -> None:
        """Bring a teacher to the memory format in which the student trains."""
        ours, theirs = (_first_convolution(model) for model in (self.student, teacher.model))
        if ours is None or theirs is None or ours.is_contiguous() or not theirs.is_contiguous():
            return
        if ours.is_contiguous(memory_format=torch.channels_last):
            teacher.model.to(memory_format=torch.channels_last)

    def factor(self, term_tap: Tap) -> float:
        # What an end-to-end criterion gives to the branch in this epoch.
        names = dict(zip(BRANCHES, ('o2m', 'o2o'), strict=True))
        criterion = getattr(self.student, 'criterion', None)
        return float(getattr(criterion, names[term_tap.part], 1.0)) if term_tap.part else 1.0

    def size_option(self, side: str) -> str:
        return 'imgsz' if side == 'student' else super().size_option(side)

    def missed(self, student: nn.Module) -> str:
        from ultralytics.nn.tasks import BaseModel

        from kd_plugins.yolo.criterion import KDCriterion

        own: Any = type(student)
        if own.loss is not BaseModel.loss and not own.__module__.startswith('ultralytics.'):
            return (
                f'{own.__name__} has a loss() of its own that never calls self.criterion, where the callback adds its '
                'losses'
            )
        if type(getattr(student, 'criterion', None)) is not KDCriterion:
            return f'somebody replaced the criterion of {own.__name__} after the callback had added its losses to it'
        return f'nothing called the criterion of {own.__name__}, where the callback adds its losses'


def _first_convolution(model: nn.Module) -> Tensor | None:
    """A weight whose memory format tells that of the model."""
    return next((p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1), None)
