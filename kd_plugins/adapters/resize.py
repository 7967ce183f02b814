"""Resampling to the teacher's grid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate


class ResizeAdapter(nn.Module):
    """Bilinear interpolation of the student's map to the teacher's grid; no parameters.

    The grid is the teacher's at every call, because multi-scale training changes the input size.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Resample.

        Args:
            student: ``(B, C, H, W)``.
            teacher: ``(B, C', H', W')``; only its grid is used.

        Returns:
            ``(B, C, H', W')``; ``student`` itself when the grids are equal.
        """
        size = teacher.shape[-2:]
        if student.shape[-2:] == size:
            return student
        return interpolate(student, size=tuple(size), mode='bilinear', align_corners=False)

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, e.g. ``'resize 10x10->20x20'``."""
        (h, w), (teacher_h, teacher_w) = student_shape[-2:], teacher_shape[-2:]
        return f'resize {h}x{w}->{teacher_h}x{teacher_w}'
