"""Calling a loss on two predictions of the same form, and refusing what it would misread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.losses import BinaryKLDivLoss, DISTLoss, DKDLoss, HardLabelLoss, KLDivLoss, OFALoss
from kd_plugins.predictions import (
    ClassPredictions,
    DensePredictions,
    PixelPredictions,
    common_grid,
    map_class_labels,
    map_labels,
)

Classes = tuple[Sequence[int], Sequence[int]] | None
Predictions = DensePredictions | PixelPredictions | ClassPredictions

#: Losses on logits that are meant for one kind of classes.
_KINDS = {'softmax': (DISTLoss, DKDLoss, HardLabelLoss, KLDivLoss, OFALoss), 'sigmoid': (BinaryKLDivLoss,)}
_WORDS = {'softmax': 'a softmax together', 'sigmoid': 'a sigmoid each'}


def call_loss(
    loss: nn.Module, student: Predictions, teacher: Predictions, target: Tensor | None = None, classes: Classes = None
) -> Tensor:
    """What a loss says of two aligned predictions.

    Args:
        loss: Its ``consumes`` says what it takes: whole predictions, or the class logits in them.
        student: Predictions of the student.
        teacher: Predictions of the teacher, of the same form and classes.
        target: Labels of the batch in the student's classes, or None.
        classes: ``(student_index, teacher_index)`` of the classes that are compared; None: all.

    Returns:
        Scalar.

    Raises:
        DistillError: The loss does not suit these heads.
    """
    device = student.cls.device if isinstance(student, DensePredictions) else student.logits.device
    with torch.autocast(device.type, enabled=False):
        if isinstance(student, PixelPredictions):
            return _on_pixels(loss, student, teacher, target, classes)
        if isinstance(student, ClassPredictions):
            return _on_classes(loss, student, teacher, target, classes)
        if getattr(loss, 'consumes', None) == 'predictions':
            return loss(student, teacher)
        # A loss on logits may know what to make of a whole head (its objectness, for one).
        if hasattr(loss, 'from_predictions'):
            return loss.from_predictions(student, teacher)
        return loss(student.class_logits(), teacher.class_logits())


def _on_classes(
    loss: nn.Module,
    student: ClassPredictions,
    teacher: ClassPredictions,
    target: Tensor | None,
    classes: Classes,
) -> Tensor:
    kind = student.activation
    if any(isinstance(loss, types) and kind not in (right, 'either') for right, types in _KINDS.items()):
        other = 'BinaryKLDivLoss' if kind == 'sigmoid' else 'KLDivLoss'
        raise DistillError(
            f'{type(loss).__name__} does not suit this classifier, whose classes are {_WORDS[kind]}; write '
            f"loss=dict(type='{other}')."
        )
    ours, theirs = full(student.logits), full(teacher.logits)
    if classes is not None and kind != 'sigmoid' and target is not None:
        target, known = map_class_labels(target, classes[0])
        ours, theirs, target = ours[known], theirs[known], target[known]
        if not len(ours):
            # Not one image of this batch is of a class that the teacher knows.
            return student.logits.sum() * 0
    return loss(ours, theirs, target) if getattr(loss, 'needs_target', False) else loss(ours, theirs)


def _on_pixels(
    loss: nn.Module,
    student: PixelPredictions,
    teacher: PixelPredictions,
    target: Tensor | None,
    classes: Classes,
) -> Tensor:
    name = type(loss).__name__
    if getattr(loss, 'consumes', None) != 'segmentation':
        if getattr(loss, 'needs_target', False):
            raise DistillError(f'{name} does not know which pixels to ignore; use PixelwiseKLDivLoss.')
        kind = 'softmax' if student.binary else student.activation
        if any(isinstance(loss, types) and kind != right for right, types in _KINDS.items()):
            raise DistillError(
                f'{name} does not suit these heads, whose classes are {_WORDS[kind]}; write '
                f"loss=dict(type='PixelwiseKLDivLoss', sigmoid={kind == 'sigmoid'})."
            )
        student, teacher = common_grid(student, teacher)
        return loss(full(student.class_logits()), full(teacher.class_logits()))
    many = student.activation == 'sigmoid' and not student.binary
    if hasattr(loss, 'sigmoid') and loss.sigmoid != many and not student.binary:
        raise DistillError(
            f'{name} has sigmoid={loss.sigmoid}, but the classes of these heads are '
            f'{_WORDS[student.activation]}; write '
            f"loss=dict(type='{name}', sigmoid={many})."
        )
    if not getattr(loss, 'needs_target', False):
        return loss(student.logits, teacher.logits)
    if target is not None:
        ours = None if classes is None else classes[0]
        target = map_labels(target, ours, (student.ignore_index,), getattr(loss, 'ignore_index', 255))
    return loss(student.logits, teacher.logits, target)


def full(tensor: Tensor) -> Tensor:
    """Half precision as float32: losses overflow in it."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
