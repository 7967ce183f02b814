"""A user's file: keypoints of Ultralytics' pose heads, with their reader and a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.losses.base import DistillLoss
from kd_plugins.predictions import Classes, Form, register_reader
from kd_plugins.yolo.heads import select_branch


@dataclass(frozen=True)
class Keypoints(Form):
    """Where every position of a head sees the keypoints of its object."""

    name: ClassVar[str] = 'keypoints'
    head: ClassVar[str] = 'pose'
    by_class: ClassVar[bool] = False
    trains_alone: ClassVar[bool] = True

    offsets: Tensor  # (B, K * D, A), as the head has them
    confidence: Tensor  # (B, A)

    @property
    def source(self) -> Tensor:
        return self.offsets

    def describe(self) -> str:
        return '{} keypoint values at {} positions'.format(*self.offsets.shape[1:])

    @classmethod
    def align(cls, student: Keypoints, teacher: Keypoints, classes: Classes = None) -> tuple[Keypoints, Keypoints]:
        if student.offsets.shape != teacher.offsets.shape:
            raise DistillError(f'{student.describe()} of the student, {teacher.describe()} of the teacher.')
        return student, teacher


@register_reader('ultralytics.Pose', form=Keypoints)
@register_reader('ultralytics.Pose26', form=Keypoints)
def read_keypoints(head: nn.Module, outputs: Any, *, training: bool, part: str | None = None) -> Keypoints:
    """They stand beside boxes and scores."""
    raw = select_branch(outputs, part or 'one2many')
    return Keypoints(raw['kpts'], raw['scores'].sigmoid().amax(1))


class KeypointLoss(DistillLoss):
    """L1 of the offsets, weighted by the teacher's confidence."""

    consumes = 'keypoints'

    def forward(self, student: Keypoints, teacher: Keypoints) -> Tensor:
        gap = (student.offsets - teacher.offsets).abs().mean(1)
        return (gap * teacher.confidence).sum() / teacher.confidence.sum()
