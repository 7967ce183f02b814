"""Feature imitation by direction: the cosine between the two feature vectors at every position."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import aligned, full_precision, mean_over_positions
from kd_plugins.losses.base import DistillLoss


def cosine_feature(student: Tensor, teacher: Tensor) -> Tensor:
    r"""One minus the cosine of the student's and the teacher's feature vector, position by position.

    .. math:: \frac{1}{B N} \sum_{b, i} \left( 1 - \cos(f^s_{bi}, f^t_{bi}) \right)
              = \frac{1}{2 B N} \sum_{b, i} \left\| \hat f^s_{bi} - \hat f^t_{bi} \right\|_2^2,
              \quad \hat f = \frac{f}{\|f\|_2}

    with a vector of all channels at each of N positions. The student's map has passed a projector (here the term's
    adapter). Liao et al., "RT-DETRv4: Painlessly Furthering Real-Time Object Detection with Vision Foundation Models"
    (arXiv 2510.25257) teaches a detector the features of a foundation model this way. The spatial view of Fan et al.,
    "ScaleKD" (NeurIPS 2024, arXiv 2411.06786), ``alpha`` times the summed squared difference of the normalised maps
    over the batch size, is ``2 alpha N`` times this: its ``alpha`` of 0.08 is a weight of 31.4 on a 14x14 grid.

    The normalised difference is what is computed: it is exactly 0 at equality, where one minus a cosine is a rounding
    error. Neither vector's length matters, and so nothing says how long the student's become.

    Deviation: a vector of zeros (dead ReLUs, blank padding) has no direction. It counts 1/2 against any other and 0
    against another one of zeros, where a cosine of 0 would count 1 even between equal features. Vectors shorter than
    1e-4 are not brought to unit length, which bounds the gradient.

    Reduction: mean over positions and images.

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
        return mean_over_positions((_directions(student) - _directions(teacher)).square().sum(1) / 2)


def _directions(features: Tensor) -> Tensor:
    """Unit length over the channels; shorter than 1e-4 as if it were 1e-4."""
    # The gradient below the floor is at most 1e4, which float16 holds also at a single position.
    return features * features.square().sum(1, keepdim=True).clamp(min=1e-8).rsqrt()


class CosineFeatureLoss(DistillLoss):
    """Module form of `cosine_feature`, which see."""

    consumes = 'features'

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cosine_feature(student, teacher)
