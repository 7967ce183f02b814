"""A trainable projection to the teacher's width, for tokens and vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd_plugins.adapters._common import check_integers, count
from kd_plugins.adapters.base import Adapter


class LinearAdapter(Adapter):
    """Linear layer with bias on the last dimension: what `ConvAdapter` is for maps.

    Args:
        in_features: Width of the student's tokens or vectors.
        out_features: Width of the teacher's.

    Raises:
        DistillError: A width is not a positive integer.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        check_integers('LinearAdapter', 1, in_features=in_features, out_features=out_features)
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Project.

        Args:
            student: ``(B, N, in_features)`` tokens or ``(B, in_features)`` vectors.
            teacher: Not used.

        Returns:
            ``(B, N, out_features)`` or ``(B, out_features)``.
        """
        # As in ConvAdapter: captured under autocast, perhaps adapted outside of it.
        return self.linear(student.to(self.linear.weight.dtype))

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, e.g. ``'linear 192->384 (74.1k params)'``."""
        return f'linear {self.linear.in_features}->{self.linear.out_features} ({count(self)} params)'
