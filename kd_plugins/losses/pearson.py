"""Feature imitation that ignores magnitude: Pearson correlation of every channel."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import aligned, full_precision
from kd_plugins.losses.base import DistillLoss


def pearson(student: Tensor, teacher: Tensor) -> Tensor:
    r"""One minus the Pearson correlation of student and teacher, channel by channel.

    .. math:: \frac{1}{C} \sum_c (1 - r_c) = \frac{1}{2 B C H W} \sum (\hat f^s - \hat f^t)^2,
              \quad \hat f = \frac{f - \mu_c}{\sigma_c}

    with mean, standard deviation and correlation of a channel taken over all images and positions. Cao et al., "PKD:
    General Distillation Framework for Object Detectors via Pearson Correlation Coefficient" (NeurIPS 2022,
    arXiv 2207.02039). The standardised difference is what is computed: it is exactly 0 at equality.

    Deviations: the standard deviation is the population's (divided by n = B H W); MMRazor's ``PKDLoss`` divides by
    n - 1 and is ``(n - 1) / n`` times this. The floor is under the root (variance 1e-10) instead of added to the
    deviation. A channel that is constant in one of the two counts 1/2, one that is constant in both counts 0.

    Reduction: mean over the channels. The images of a batch are coupled: the loss of a batch is not the mean of its
    images' losses.

    Args:
        student: ``(B, C, H, W)`` features, or any ``(B, C, ...)``.
        teacher: Same shape as ``student``; no gradient flows into it.

    Returns:
        Scalar between 0 and 2, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ, or there is no channel dimension.
    """
    student, teacher = aligned(student, teacher, 'Features', "an adapter brings them together: adapter='auto'")
    if student.dim() < 2:
        raise DistillError(f'Features must be (B, C, ...), got {tuple(student.shape)}.')
    with full_precision(student):
        return (_standardized(student) - _standardized(teacher)).square().sum() / (2 * max(student.numel(), 1))


def _standardized(features: Tensor) -> Tensor:
    """Zero mean and unit deviation of every channel; ``(C, B * positions)``."""
    features = features.transpose(0, 1).flatten(1)
    centred = features - features.mean(-1, keepdim=True)
    # Once more: the rounding error of the first mean is all that a constant channel has left, and would be scaled up.
    centred = centred - centred.mean(-1, keepdim=True)
    # A higher floor would bend small features, a lower one overflow the float16 gradients of a constant channel.
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-10).rsqrt()


class PearsonLoss(DistillLoss):
    """Module form of `pearson`, which see."""

    consumes = 'features'

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pearson(student, teacher)
