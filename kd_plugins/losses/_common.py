"""What all losses share: checked numbers, full precision, and the documented reductions."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kd_plugins.errors import DistillError


def check_positive(**values: Any) -> None:
    """Raise DistillError unless every value is a finite number > 0, or a scalar tensor."""
    for name, value in values.items():
        # One that is learned is a tensor, which nobody waits for.
        if isinstance(value, Tensor) and value.dim() == 0:
            continue
        if not _is_finite_number(value) or value <= 0:
            raise DistillError(f'{name} must be a finite number > 0, got {value!r}.')


def check_not_negative(**values: Any) -> None:
    """Raise DistillError unless every value is a finite number >= 0."""
    for name, value in values.items():
        if not _is_finite_number(value) or value < 0:
            raise DistillError(f'{name} must be a finite number >= 0, got {value!r}.')


def check_choice(choices: tuple[Any, ...], **values: Any) -> None:
    """Raise DistillError unless every value is one of ``choices`` (True is not 1 here)."""
    for name, value in values.items():
        if not any(type(value) is type(c) and value == c for c in choices):
            raise DistillError(f'{name} must be one of {", ".join(map(repr, choices))}, got {value!r}.')


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device: losses overflow in half precision."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def as_full(tensor: Tensor) -> Tensor:
    """Float32, unless it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def aligned(student: Tensor, teacher: Tensor, what: str, advice: str = '') -> tuple[Tensor, Tensor]:
    """Student and detached teacher in full precision.

    Args:
        student: Any shape.
        teacher: Same shape as ``student``.
        what: What is compared, for the message, e.g. ``'class logits'``.
        advice: Ends the message: what to do about different shapes.

    Raises:
        DistillError: One is not a tensor, or the shapes differ (broadcasting would hide a mistake).
    """
    for role, value in (('student', student), ('teacher', teacher)):
        if not isinstance(value, Tensor):
            raise DistillError(f'{what} of the {role} must be one tensor, got {type(value).__name__}.')
    if student.shape != teacher.shape:
        raise DistillError(
            f'{what} of the student are {tuple(student.shape)} but those of the teacher are {tuple(teacher.shape)}'
            + (f'; {advice}.' if advice else '.')
        )
    return as_full(student), as_full(teacher.detach())


def mean_over_positions(loss: Tensor, weight: Tensor | None = None) -> Tensor:
    """Reduce a loss per position to a scalar.

    Without ``weight``: the mean over images and positions. With it: per image
    ``sum(weight * loss) / max(sum(weight), 1)``, then the mean over images. Normalising per image keeps the loss of
    a batch equal to the mean over its images, so that it does not depend on how images are spread over batches,
    accumulation steps or GPUs. The floor of one position keeps an image in which the teacher sees nothing from
    being blown up to the importance of one with objects.

    Args:
        loss: ``(B, ...)``.
        weight: ``(B, ...)``, the shape of ``loss``; not differentiated. None means uniform.

    Returns:
        Scalar; 0 when there are no positions.
    """
    if weight is None:
        return loss.sum() / max(loss.numel(), 1)
    if weight.shape != loss.shape:
        raise DistillError(f'weight must have one value per position, {tuple(loss.shape)}, got {tuple(weight.shape)}.')
    loss = loss[:, None].flatten(1)
    weight = weight.detach().to(loss.dtype)[:, None].flatten(1)
    per_image = (weight * loss).sum(1) / weight.sum(1).clamp(min=1)
    return per_image.sum() / max(len(per_image), 1)


def describe(**values: Any) -> str:
    """Hyper-parameters as ``name=value, ...`` for ``extra_repr``."""
    return ', '.join(f'{name}={value!r}' for name, value in values.items())


def reason_for_absence(predictions: Any, field: str) -> str:
    """``' (why)'`` when the predictions say why a field is None, otherwise nothing."""
    reason = getattr(predictions, 'absent', {}).get(field)
    return f' ({reason})' if reason else ''
