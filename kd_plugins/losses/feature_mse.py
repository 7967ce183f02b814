"""Feature imitation: mean squared error of intermediate feature maps."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.losses._common import aligned, full_precision
from kd_plugins.losses.base import DistillLoss


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference of two feature maps.

    .. math:: \frac{1}{B C H W} \sum (f^s - f^t)^2

    Romero et al., "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), equation 3, where the student's map has
    passed a regressor (here the term's adapter). Deviation: the mean over all elements instead of half the sum, so
    that a weight means the same for every map size and input resolution.

    Args:
        student: ``(B, C, H, W)`` features, or any shape.
        teacher: Same shape as ``student``; no gradient flows into it.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ.
    """
    student, teacher = aligned(student, teacher, 'Features', "an adapter brings them together: adapter='auto'")
    with full_precision(student):
        return (student - teacher).square().sum() / max(student.numel(), 1)


class FeatureMSELoss(DistillLoss):
    """Module form of `feature_mse`, which see."""

    consumes = 'features'

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return feature_mse(student, teacher)
