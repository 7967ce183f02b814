"""The canonical form that semantic segmentation heads are read into, and how two of them are made comparable."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import as_full
from kd_plugins.losses.base import Declaration
from kd_plugins.predictions.form import (
    Classes,
    Form,
    common_shape,
    mean_of_sigmoid,
    mean_of_softmax,
    refuse_activation,
)

ACTIVATIONS = ('softmax', 'sigmoid')


@dataclass(frozen=True)
class PixelPredictions(Form):
    """Raw predictions of a semantic segmentation head for one batch of images.

    Attributes:
        logits: ``(B, C, h, w)`` class logits on the head's own grid. ``C = 1`` is a binary head: the logit of class 1
            of 2, whatever ``activation`` says.
        activation: ``'softmax'`` (classes exclude each other) or ``'sigmoid'`` (every class is a yes or no).
        ignore_index: The label that the head's own loss ignores, or None.

    Raises:
        DistillError: ``logits`` is no map, or the activation is unknown.
    """

    name: ClassVar[str] = 'segmentation'
    head: ClassVar[str] = 'segmentation'
    # Segmentation heads all have a forward of their own, which returns logits.
    decoding: ClassVar[tuple[str, ...]] = ('predict', 'predict_by_feat')
    has_class_logits: ClassVar[bool] = True
    as_maps: ClassVar[bool] = True
    # mmseg's cascades run a stage again to feed the next one.
    repeated: ClassVar[bool] = True

    logits: Tensor
    activation: str = 'softmax'
    ignore_index: int | None = 255

    def __post_init__(self) -> None:
        if not isinstance(self.logits, Tensor) or self.logits.dim() != 4:
            kind = tuple(self.logits.shape) if isinstance(self.logits, Tensor) else type(self.logits).__name__
            raise DistillError(f'Class logits of a segmentation head must be (B, C, h, w), got {kind}.')
        if self.activation not in ACTIVATIONS:
            raise DistillError(f'activation must be one of {ACTIVATIONS}, got {self.activation!r}.')

    @property
    def binary(self) -> bool:
        """Whether it is the one logit of a two-class head."""
        return self.logits.shape[1] == 1

    @property
    def num_classes(self) -> int:
        """Number of classes; 2 for a binary head."""
        return 2 if self.binary else self.logits.shape[1]

    def two_classes(self) -> PixelPredictions:
        """A binary head as the softmax head that predicts the same: logits ``(0, z)``."""
        if not self.binary:
            return self
        return self.replace(logits=torch.cat([torch.zeros_like(self.logits), self.logits], 1), activation='softmax')

    def class_logits(self) -> Tensor:
        """``(B, h * w, C)`` logits, one row per pixel."""
        return self.two_classes().logits.flatten(2).transpose(1, 2)

    @property
    def source(self) -> Tensor:
        return self.logits

    def describe(self) -> str:
        return f'{self.num_classes} classes, ' + 'x'.join(map(str, self.logits.shape[1:]))

    def in_full_precision(self) -> PixelPredictions:
        # Losses work through maps of this size in pieces, and cast those.
        return self

    def made_of(self, tensor: Tensor) -> bool:
        return tensor.shape == self.logits.shape and torch.equal(tensor, self.logits)

    def maps(self, other: PixelPredictions) -> tuple[Tensor, Tensor]:
        ours, theirs = common_grid(self, other)
        return ours.logits, theirs.logits

    @classmethod
    def align(
        cls, student: PixelPredictions, teacher: PixelPredictions, classes: Classes = None
    ) -> tuple[PixelPredictions, PixelPredictions]:
        return align_pixels(student, teacher, classes)

    @classmethod
    def average(cls, predictions: Sequence[PixelPredictions]) -> PixelPredictions:
        # Each at the size of the largest: of a coarse one probabilities, not their mean, are what its own head says.
        largest = max(predictions, key=lambda p: p.logits.shape[-2:].numel())
        logits = [common_grid(largest, p)[1].logits for p in predictions]
        common_shape(predictions, logits)
        sigmoid = largest.binary or largest.activation == 'sigmoid'
        return predictions[0].replace(logits=mean_of_sigmoid(logits) if sigmoid else mean_of_softmax(logits, 1))

    @classmethod
    def compare(
        cls,
        loss: nn.Module,
        declared: Declaration,
        student: PixelPredictions,
        teacher: PixelPredictions,
        target: Tensor | None = None,
        classes: Classes = None,
    ) -> Tensor:
        name = type(loss).__name__
        if declared.consumes != cls.name:
            if declared.needs_target:
                raise DistillError(f'{name} does not know which pixels to ignore; use PixelwiseKLDivLoss.')
            kind = 'softmax' if student.binary else student.activation
            if declared.activation not in (None, kind):
                advice = f"loss=dict(type='PixelwiseKLDivLoss', sigmoid={kind == 'sigmoid'})"
                raise refuse_activation(loss, kind, 'these heads', advice)
            student, teacher = common_grid(student, teacher)
            return loss(as_full(student.class_logits()), as_full(teacher.class_logits()))
        if declared.activation not in (None, student.activation) and not student.binary:
            other = student.activation == 'sigmoid'
            raise refuse_activation(
                loss, student.activation, 'these heads', f"loss=dict(type='{name}', sigmoid={other})"
            )
        if not declared.needs_target:
            return loss(student.logits, teacher.logits)
        if target is not None:
            ours = None if classes is None else classes[0]
            target = map_labels(target, ours, (student.ignore_index,), getattr(loss, 'ignore_index', 255))
        return loss(student.logits, teacher.logits, target)


def align_pixels(
    student: PixelPredictions,
    teacher: PixelPredictions,
    classes: tuple[Sequence[int], Sequence[int]] | None = None,
) -> tuple[PixelPredictions, PixelPredictions]:
    """Make two segmentation heads' predictions comparable class by class; their grids may still differ.

    1. A binary head (one logit) facing a softmax head of two classes becomes such a head, which is exact.
    2. ``classes`` selects and orders both. Of a softmax this leaves the distribution among the shared classes.

    Args:
        student: Predictions of the student.
        teacher: Predictions of the teacher for the same images.
        classes: ``(student_indices, teacher_indices)`` of the classes that correspond. None: all, in the same order.

    Returns:
        ``(student, teacher)`` of equal batch, activation and number of channels.

    Raises:
        DistillError: Batches, activations or class counts do not fit together.
    """
    if student.logits.shape[0] != teacher.logits.shape[0]:
        raise DistillError(
            f'The student predicts for {student.logits.shape[0]} images and the teacher for {teacher.logits.shape[0]}.'
        )
    if not (student.binary and teacher.binary and classes is None):
        student, teacher = student.two_classes(), teacher.two_classes()
    if not student.binary and student.activation != teacher.activation:
        raise DistillError(
            f"The student's classes are a {student.activation} and the teacher's a {teacher.activation}: the one "
            'shares probability among the classes, the other does not, and no logits of one are those of the other; '
            'distil features, e.g. from the backbone, or take a teacher with the same kind of loss.'
        )
    if classes is not None:
        sides = []
        for predictions, index in zip((student, teacher), classes, strict=True):
            chosen = _numbers(tuple(index), predictions.logits.device)
            sides.append(predictions.replace(logits=predictions.logits.index_select(1, chosen)))
        student, teacher = sides
    if student.logits.shape[1] != teacher.logits.shape[1]:
        raise DistillError(
            f'The student predicts {student.num_classes} classes and the teacher {teacher.num_classes}: give the names '
            "of the teacher's as teacher.classes, so that they are matched by name."
        )
    return student, teacher


def common_grid(student: PixelPredictions, teacher: PixelPredictions) -> tuple[PixelPredictions, PixelPredictions]:
    """Bring both to the larger grid, by bilinear interpolation of the smaller one's logits."""
    ours, theirs = student.logits.shape[-2:], teacher.logits.shape[-2:]
    if ours == theirs:
        return student, teacher
    if ours.numel() < theirs.numel():
        return student.replace(logits=_resized(student.logits, theirs)), teacher
    return student, teacher.replace(logits=_resized(teacher.logits, ours))


def _resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    return interpolate(logits, size=tuple(size), mode='bilinear', align_corners=False)


def map_labels(target: Tensor, known: Sequence[int] | None, ignored: Sequence[int | None], ignore_index: int) -> Tensor:
    """Labels in terms of the classes that are compared.

    A pixel whose class only the student knows is left out: what the teacher says there is a guess among classes that
    are all wrong.

    Args:
        target: ``(B, H, W)`` integer labels.
        known: The student's classes that are compared, in order; None: all.
        ignored: Labels that do not count; None entries are skipped.
        ignore_index: What they become.

    Returns:
        ``(B, H, W)`` labels; ``target`` itself when nothing changes.

    Raises:
        DistillError: ``ignore_index`` would be the number of a class as well.
    """
    if known is not None and 0 <= ignore_index < len(known):
        raise DistillError(
            f'ignore_index={ignore_index} is also the number of a class once classes are matched by name; leave it at '
            '255: what the head itself ignores is ignored in any case.'
        )
    result = target
    for label in ignored:
        if label is not None and label != ignore_index:
            result = result.masked_fill(target == label, ignore_index)
    if known is None:
        return result
    new_of = [ignore_index] * (max(known) + 2)
    for new, old in enumerate(known):
        new_of[old] = new
    # The last entry stands for every label beyond the classes, "ignored" among them.
    table = _numbers(tuple(new_of), result.device)
    beyond = (result < 0) | (result >= len(new_of))
    return table[result.masked_fill(beyond, len(new_of) - 1).long()].to(result.dtype)


@functools.lru_cache(maxsize=64)
def _numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Moved once, because a copy from the CPU makes the host wait for the GPU."""
    return torch.tensor(values, device=device)
