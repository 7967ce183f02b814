"""Channel-wise distillation: where in the image each channel looks."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import aligned, check_positive, describe, full_precision
from kd_plugins.losses.base import DistillLoss


def channel_wise_div(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    r"""KL divergence of every channel's distribution over the positions.

    .. math:: \frac{T^2}{B C} \sum_b \sum_c \sum_i p^t_{bci} \log \frac{p^t_{bci}}{p^s_{bci}},
              \quad p_{bci} = \frac{\exp(y_{bci} / T)}{\sum_j \exp(y_{bcj} / T)}

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction" (ICCV 2021, arXiv 2011.13256), equations
    5-7. A constant added to a channel does not matter: the loss compares which positions stand out, not how strongly
    the channel responds as a whole. The map may be one of class logits, whose channels are classes, or of features.
    The authors' code takes the logarithm of the softmax, which is infinite at large gaps; it is ``log_softmax`` here.

    Reduction: sum over the positions, mean over channels and images. Unlike most losses on maps it is not a mean over
    positions: each channel is one distribution.

    Args:
        student: ``(B, C, H, W)`` logits or features, or ``(B, C, ...)`` with at least one spatial dimension.
        teacher: Same shape as ``student``; no gradient flows into it.
        temperature: ``T`` > 0. The larger it is, the more positions count.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ, there are no positions to compare, or the temperature is out of range.
    """
    check_positive(temperature=temperature)
    student, teacher = aligned(student, teacher, 'Features', "an adapter brings them together: adapter='auto'")
    if student.dim() < 3:
        raise DistillError(f'Features must be maps, (B, C, H, W), got {tuple(student.shape)}; use KLDivLoss.')
    with full_precision(student):
        log_student = (student.flatten(2) / temperature).log_softmax(-1)
        log_teacher = (teacher.flatten(2) / temperature).log_softmax(-1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
        return temperature**2 * divergence.sum() / max(divergence.numel(), 1)


class ChannelWiseDivLoss(DistillLoss):
    """Module form of `channel_wise_div`, which see. Consumes maps of features or of class logits."""

    consumes = 'features'

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return channel_wise_div(student, teacher, temperature=self.temperature)

    def extra_repr(self) -> str:
        return describe(temperature=self.temperature)
