"""The adapter that a pair of shapes needs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd_plugins.adapters._common import count
from kd_plugins.adapters.conv import ConvAdapter
from kd_plugins.adapters.resize import ResizeAdapter
from kd_plugins.errors import DistillError


class AdapterChain(nn.Sequential):
    """Adapters one after the other; each sees the teacher's features too."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        for adapter in self:
            student = adapter(student, teacher)
        return student

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, e.g. ``'conv 1x1 96->256 (24.8k params), resize 10x10->20x20'``."""
        return ', '.join(describe_adapter(adapter, student_shape, teacher_shape) for adapter in self)


def auto_adapter(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module | None:
    """Build the adapter that brings the student's features to the teacher's shape.

    Args:
        student_shape: ``(B, C, H, W)`` of the student's features.
        teacher_shape: ``(B, C', H', W')`` of the teacher's.

    Returns:
        None when nothing differs, a `ConvAdapter` when the channels do, a `ResizeAdapter` when the grids do, and a
        chain of both, in this order, when both do. The caller puts it on a device.

    Raises:
        DistillError: One of two different shapes is not a feature map, or the batch sizes differ.
    """
    student_shape, teacher_shape = tuple(student_shape), tuple(teacher_shape)
    if student_shape == teacher_shape:
        return None
    for role, shape in (('student', student_shape), ('teacher', teacher_shape)):
        if len(shape) != 4:
            raise DistillError(
                f'No automatic adapter between student {student_shape} and teacher {teacher_shape}: the {role} is not '
                'a (B, C, H, W) map; tap modules with maps or equal shapes, or name an adapter of your own.'
            )
    if student_shape[0] != teacher_shape[0]:
        raise DistillError(
            f'Student {student_shape} and teacher {teacher_shape} differ in the batch size; tap modules that see '
            'whole images, not regions.'
        )
    parts = []
    if student_shape[1] != teacher_shape[1]:
        parts.append(ConvAdapter(student_shape[1], teacher_shape[1]))
    if student_shape[2:] != teacher_shape[2:]:
        parts.append(ResizeAdapter())
    return parts[0] if len(parts) == 1 else AdapterChain(*parts)


def describe_adapter(adapter: nn.Module | None, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
    """An adapter in words, for the summary table.

    Args:
        adapter: None, one of ours, or any module; a module may have
            ``describe(student_shape, teacher_shape) -> str``.
        student_shape: Shape of the features that go in.
        teacher_shape: Shape of the teacher's features.

    Returns:
        E.g. ``'none'``, ``'conv 1x1 96->256 (24.8k params)'``, ``'MyAdapter (1.2M params)'``.
    """
    if adapter is None:
        return 'none'
    if hasattr(adapter, 'describe'):
        return adapter.describe(student_shape, teacher_shape)
    return f'{type(adapter).__name__} ({count(adapter)} params)'
