"""Channels brought to mean 0 and variance 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_plugins.adapters.base import Adapter
from kd_plugins.errors import DistillError


class ChannelNorm(Adapter):
    """Every channel with mean 0 and variance 1 over the positions of all images of the batch; no parameters.

    What a ``BatchNorm2d(affine=False, track_running_stats=False)`` does, and what MMYOLO puts behind both necks for its
    distilled RTMDet: the magnitudes of a channel, which are each network's own, no longer decide how sharp a softmax
    over its positions is or how much it counts in a squared difference. The statistics are those of the batch at hand
    (of each GPU on its own), so losses of a batch are not means over those of its images.

    Args:
        eps: Added to the variance. Default: 1e-5.

    Raises:
        DistillError: ``eps`` is not a number above 0.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < float('inf'):
            raise DistillError(f'ChannelNorm: eps must be a finite number > 0, got {eps!r}.')
        self.eps = eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Normalise the first argument; as a ``teacher_adapter`` that is the teacher.

        Args:
            student: ``(B, C, H, W)`` map or ``(B, N, C)`` tokens.
            teacher: Not used.

        Returns:
            The same shape in float32 (float64 stays). A channel that is the same everywhere becomes 0.

        Raises:
            DistillError: It is neither map nor tokens: a vector has no positions.
        """
        if student.dim() not in (3, 4):
            raise DistillError(
                f'ChannelNorm normalises maps (B, C, H, W) and tokens (B, N, C), not {tuple(student.shape)}; remove it.'
            )
        over = (0, 2, 3) if student.dim() == 4 else (0, 1)
        # Statistics of half precision overflow; autocast lowers none of these.
        features = student if student.dtype == torch.float64 else student.float()
        variance, mean = torch.var_mean(features, over, correction=0, keepdim=True)
        return (features - mean) * (variance + self.eps).rsqrt()

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """``'channel norm'``."""
        return 'channel norm'
