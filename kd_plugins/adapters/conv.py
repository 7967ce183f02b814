"""A trainable projection to the teacher's channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd_plugins.adapters._common import count
from kd_plugins.errors import DistillError


class ConvAdapter(nn.Module):
    """1x1 convolution with bias from the student's channels to the teacher's (FitNets' regressor).

    Args:
        in_channels: Channels of the student's features.
        out_channels: Channels of the teacher's features.

    Raises:
        DistillError: A channel count is not a positive integer.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        for name, value in (('in_channels', in_channels), ('out_channels', out_channels)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DistillError(f'ConvAdapter: {name} must be an integer >= 1, got {value!r}.')
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Project.

        Args:
            student: ``(B, in_channels, H, W)``.
            teacher: Not used.

        Returns:
            ``(B, out_channels, H, W)``.
        """
        # A map captured under autocast is half precision, but the adapter may run outside of it.
        return self.conv(student.to(self.conv.weight.dtype))

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, e.g. ``'conv 1x1 96->256 (24.8k params)'``."""
        return f'conv 1x1 {self.conv.in_channels}->{self.conv.out_channels} ({count(self)} params)'
