"""Knowledge distillation of multi-label (sigmoid) classifiers: a binary KL divergence per class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kd_plugins.losses._common import (
    aligned,
    as_full,
    check_choice,
    check_positive,
    describe,
    full_precision,
    mean_over_positions,
)
from kd_plugins.losses._dense import Dense
from kd_plugins.losses.base import DistillLoss


def binary_kl_div(
    student: Tensor, teacher: Tensor, weight: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    r"""Binary KL divergence between teacher and student, summed over the classes.

    .. math:: T^2 \, \operatorname{mean}_a \sum_c
              \left[ \mathrm{BCE}(\sigma(z^s_{ac} / T), p) - H(p) \right], \quad p = \sigma(z^t_{ac} / T)

    Dense detectors and multi-label classifiers have one sigmoid per class, whose absolute scores a softmax would
    ignore: Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection"
    (ICCV 2023, arXiv 2308.14286), who treat each class as a binary problem as here. Deviations: the teacher's
    entropy ``H(p)`` is subtracted, so that the loss is 0 at equality instead of having a floor (same gradient);
    their modulation by ``|p^t - p^s|`` is replaced by the optional ``weight``. ``T^2`` as in Hinton et al.
    (arXiv 1503.02531).

    Reduction: sum over the classes, mean over positions and images; with ``weight`` the weighted mean over the
    positions of each image, divided by ``max(sum(weight), 1)``, then the mean over images.

    Args:
        student: ``(..., C)`` logits; the first dimension is the image.
        teacher: ``(..., C)`` logits; no gradient flows into it.
        weight: ``(...)`` weight >= 0 of every position, or None for uniform.
        temperature: ``T`` > 0.

    Returns:
        Scalar >= 0 (up to rounding), in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ, or a hyper-parameter is out of range.
    """
    check_positive(temperature=temperature)
    student, teacher = aligned(student, teacher, 'Class logits', 'map the classes by name first')
    with full_precision(student):
        student, teacher = student / temperature, teacher / temperature
        with torch.no_grad():
            target = teacher.sigmoid()
            # The same kernel as below: at equality both are equal to the last bit.
            entropy = binary_cross_entropy_with_logits(teacher, target, reduction='none')
        divergence = binary_cross_entropy_with_logits(student, target, reduction='none') - entropy
        return temperature**2 * mean_over_positions(divergence.sum(-1), weight)


class BinaryKLDivLoss(DistillLoss):
    """Module form of `binary_kl_div`, which see. Consumes ``(..., C)`` logits of independent classes.

    Args:
        temperature: Softening of both sigmoids.
        foreground: Weight positions by the teacher's confidence, which is the highest class probability of the
            position (temperature 1) unless ``forward`` is given another ``weight``.
    """

    consumes = 'logits'
    activation = 'sigmoid'

    def __init__(self, temperature: float = 1.0, foreground: bool = False) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        check_choice((False, True), foreground=foreground)
        self.temperature = temperature
        self.foreground = foreground

    def forward(self, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            student: ``(..., C)`` logits.
            teacher: ``(..., C)`` logits.
            weight: ``(...)`` the teacher's confidence where it is known better than from the class logits (heads
                with objectness train them on objects only). Not used unless ``foreground``.
        """
        if not self.foreground:
            weight = None
        elif weight is None:
            weight = as_full(teacher.detach()).amax(-1).sigmoid()
        return binary_kl_div(student, teacher, weight, temperature=self.temperature)

    def from_predictions(self, student: Dense, teacher: Dense) -> Tensor:
        """The loss of two aligned detection heads: `forward` on what these know better than bare logits do.

        The classes of a softmax head become independent ones (without the background), and the weight of a head with
        objectness includes it.

        Args:
            student: Predictions of the student.
            teacher: Predictions of the teacher at the same positions.
        """
        # In full precision first: a probability of 1 - 1e-6 is 1 in half precision, and its logit infinite.
        student, teacher = student.float(), teacher.float()
        with full_precision(student.cls):
            weight = teacher.confidence() if self.foreground else None
            return self(student.binary_logits(), teacher.binary_logits(), weight)

    def extra_repr(self) -> str:
        return describe(temperature=self.temperature, foreground=self.foreground)
