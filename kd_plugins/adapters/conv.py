"""A trainable projection to the teacher's channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd_plugins.adapters._common import check_integers, check_switches, count
from kd_plugins.adapters.base import Adapter


class ConvAdapter(Adapter):
    """1x1 convolution from the student's channels to the teacher's (FitNets' regressor).

    Args:
        in_channels: Channels of the student's features.
        out_channels: Channels of the teacher's features.
        norm: Put a ``BatchNorm2d`` behind it, as many published regressors have; the convolution then has no bias,
            which the norm would take out again. In training it needs more than one value per channel, so not a
            single image with a 1x1 grid. Default: False.

    Raises:
        DistillError: A channel count is not a positive integer, or ``norm`` is not a truth value.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: bool = False) -> None:
        super().__init__()
        check_integers('ConvAdapter', 1, in_channels=in_channels, out_channels=out_channels)
        check_switches('ConvAdapter', norm=norm)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Project.

        Args:
            student: ``(B, in_channels, H, W)``.
            teacher: Not used.

        Returns:
            ``(B, out_channels, H, W)``.
        """
        # A map captured under autocast is half precision, but the adapter may run outside of it.
        projected = self.conv(student.to(self.conv.weight.dtype))
        return projected if self.norm is None else self.norm(projected)

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, e.g. ``'conv 1x1 96->256 (24.8k params)'`` or ``'conv 1x1 96->256 + BN (25.1k params)'``."""
        norm = '' if self.norm is None else ' + BN'
        return f'conv 1x1 {self.conv.in_channels}->{self.conv.out_channels}{norm} ({count(self)} params)'
