"""The canonical form that classifiers are read into, and how two of them are made comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

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

ACTIVATIONS = ('softmax', 'sigmoid', 'either')


@dataclass(frozen=True)
class ClassPredictions(Form):
    """Raw predictions of a classifier for one batch of images.

    Attributes:
        logits: ``(B, C)`` class logits.
        activation: ``'softmax'`` (classes exclude each other), ``'sigmoid'`` (every class is a yes or no), or
            ``'either'`` (they exclude each other, but each was trained as a yes or no).

    Raises:
        DistillError: ``logits`` has another shape, or the activation is unknown.
    """

    name: ClassVar[str] = 'classification'
    head: ClassVar[str] = 'classification'
    decoding: ClassVar[tuple[str, ...]] = ('predict',)
    has_class_logits: ClassVar[bool] = True

    logits: Tensor
    activation: str = 'softmax'

    def __post_init__(self) -> None:
        if not isinstance(self.logits, Tensor) or self.logits.dim() != 2:
            kind = tuple(self.logits.shape) if isinstance(self.logits, Tensor) else type(self.logits).__name__
            raise DistillError(f'Class logits of a classifier must be (B, C), got {kind}.')
        if self.activation not in ACTIVATIONS:
            raise DistillError(f'activation must be one of {ACTIVATIONS}, got {self.activation!r}.')

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.logits.shape[1]

    @property
    def source(self) -> Tensor:
        return self.logits

    def describe(self) -> str:
        return f'{self.num_classes} classes'

    def made_of(self, tensor: Tensor) -> bool:
        return tensor.shape == self.logits.shape and torch.equal(tensor.to(self.logits.dtype), self.logits)

    @classmethod
    def align(
        cls, student: ClassPredictions, teacher: ClassPredictions, classes: Classes = None
    ) -> tuple[ClassPredictions, ClassPredictions]:
        return align_classes(student, teacher, classes)

    @classmethod
    def average(cls, predictions: Sequence[ClassPredictions]) -> ClassPredictions:
        logits = [p.logits for p in predictions]
        common_shape(predictions, logits)
        mean = mean_of_sigmoid(logits) if predictions[0].activation == 'sigmoid' else mean_of_softmax(logits)
        return predictions[0].replace(logits=mean)

    @classmethod
    def needs_labels(cls, classes: Classes) -> bool:
        # Images of a class that the teacher does not know are left out.
        return classes is not None

    @classmethod
    def compared_labels(cls, target: Tensor | None, classes: Classes) -> tuple[Tensor | None, Tensor | None]:
        return (target, None) if target is None or classes is None else map_class_labels(target, classes[0])

    @classmethod
    def compare(
        cls,
        loss: nn.Module,
        declared: Declaration,
        student: ClassPredictions,
        teacher: ClassPredictions,
        target: Tensor | None = None,
        classes: Classes = None,
    ) -> Tensor:
        kind = student.activation
        if declared.activation is not None and kind not in (declared.activation, 'either'):
            other = 'BinaryKLDivLoss' if kind == 'sigmoid' else 'KLDivLoss'
            raise refuse_activation(loss, kind, 'this classifier', f"loss=dict(type='{other}')")
        ours, theirs = as_full(student.logits), as_full(teacher.logits)
        if classes is not None and kind != 'sigmoid' and target is not None:
            target, known = map_class_labels(target, classes[0])
            ours, theirs, target = ours[known], theirs[known], target[known]
            if not len(ours):
                # Not one image of this batch is of a class that the teacher knows.
                return student.logits.sum() * 0
        return loss(ours, theirs, target) if declared.needs_target else loss(ours, theirs)


class ClassLogits(nn.Module):
    """Where the class logits of a classifier pass, so that they can be tapped under one name whatever the network.

    Args:
        num_classes: How many there are, or None when unknown.
        activation: See `ClassPredictions`.
    """

    def __init__(self, num_classes: int | None = None, activation: str = 'softmax') -> None:
        super().__init__()
        self.num_classes = num_classes
        self.activation = activation

    def forward(self, logits: Tensor) -> Tensor:
        """``(B, C)`` logits, as they come."""
        return logits


def align_classes(
    student: ClassPredictions,
    teacher: ClassPredictions,
    classes: tuple[Sequence[int], Sequence[int]] | None = None,
) -> tuple[ClassPredictions, ClassPredictions]:
    """Make two classifiers' predictions comparable class by class.

    Args:
        student: Predictions of the student.
        teacher: Predictions of the teacher for the same images.
        classes: ``(student_indices, teacher_indices)`` of the classes that correspond; of a softmax this leaves the
            distribution among them. None: all, in the same order.

    Returns:
        ``(student, teacher)`` of equal batch and number of classes.

    Raises:
        DistillError: Batches or class counts do not fit together.
    """
    if len(student.logits) != len(teacher.logits):
        raise DistillError(
            f'The student predicts for {len(student.logits)} images and the teacher for {len(teacher.logits)}.'
        )
    if classes is not None:
        student, teacher = (
            p.replace(logits=p.logits[:, list(index)]) for p, index in zip((student, teacher), classes, strict=True)
        )
    if student.num_classes != teacher.num_classes:
        raise DistillError(
            f'The student predicts {student.num_classes} classes and the teacher {teacher.num_classes}: give the names '
            "of the teacher's as teacher.classes, so that they are matched by name."
        )
    return student, teacher


def map_class_labels(target: Tensor, known: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Labels in terms of the classes that are compared, and which images have one.

    An image whose class only the student knows is to be left out: what the teacher says of it is a guess among classes
    that are all wrong. A mixed image counts when all that it was mixed from is known.

    Args:
        target: ``(B,)`` int64 labels, or ``(B, C)`` soft ones.
        known: The student's classes that are compared, in order.

    Returns:
        The labels, and a ``(B,)`` bool mask of the images that count.
    """
    index = list(known)
    if target.is_floating_point():
        # What label smoothing spreads over all classes says nothing of the image.
        mixed = target - target.amin(-1, keepdim=True)
        keep = mixed[:, index].sum(-1) > 0.999 * mixed.sum(-1)
        chosen = target[:, index]
        return chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-12), keep
    new_of = target.new_full((max(index) + 2,), -1)
    new_of[index] = torch.arange(len(index), device=target.device, dtype=target.dtype)
    found = new_of[target.clamp(max=len(new_of) - 1)]
    return found.clamp(min=0), found >= 0
