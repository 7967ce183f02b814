"""Localization distillation: KL divergence of the distance distributions of a GFL-style head."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import (
    aligned,
    check_choice,
    check_positive,
    describe,
    full_precision,
    mean_over_positions,
    reason_for_absence,
)
from kd_plugins.losses._dense import Dense
from kd_plugins.losses.base import DistillLoss


def localization_distill(
    student: Tensor, teacher: Tensor, weight: Tensor | None = None, *, temperature: float = 10.0
) -> Tensor:
    r"""KL divergence over the bins of every box side.

    .. math:: \tau^2 \, \operatorname{mean}_a \frac{1}{4} \sum_{e \in \{l, t, r, b\}}
              \mathrm{KL}\left( \mathcal S(z^t_{ae}, \tau) \,\|\, \mathcal S(z^s_{ae}, \tau) \right)

    Zheng et al., "Localization Distillation for Dense Object Detection" (CVPR 2022, arXiv 2102.12252), section 3,
    where S is the softmax with temperature. Deviations: the mean over the four sides instead of their sum; a weighted
    mean over all positions instead of the sum over the assigned ones and the "valuable localization region" (with the
    teacher's confidence as weight the same places count, without the student's label assignment). mmdet's ``LDHead``
    takes the mean over the bins too: its loss is R (17) times smaller than the KL divergence.

    Reduction: sum over the R bins, mean over the 4 sides, mean over positions and images; with ``weight`` the weighted
    mean over the positions of each image, divided by ``max(sum(weight), 1)``, then the mean over images.

    Args:
        student: ``(B, A, 4, R)`` logits of the distance bins.
        teacher: ``(B, A, 4, R)`` logits; no gradient flows into it.
        weight: ``(B, A)`` weight >= 0 of every position, or None for uniform.
        temperature: ``tau`` > 0; 10 in the paper.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ, or a hyper-parameter is out of range.
    """
    check_positive(temperature=temperature)
    student, teacher = aligned(student, teacher, 'Distance bins', _INSTEAD)
    with full_precision(student):
        log_student = (student / temperature).log_softmax(-1)
        log_teacher = (teacher / temperature).log_softmax(-1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean(-1)
        return temperature**2 * mean_over_positions(divergence, weight)


_INSTEAD = 'compare decoded boxes with YOLOLogitLoss(obj_weight=0, cls_weight=0) instead'


class LocalizationDistillLoss(DistillLoss):
    """Module form of `localization_distill`. Consumes two aligned ``DensePredictions`` that both have ``dist``.

    Args:
        temperature: ``tau`` of the paper.
        foreground: Weight positions by ``teacher.confidence()``.
    """

    consumes = 'predictions'

    def __init__(self, temperature: float = 10.0, foreground: bool = True) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        check_choice((False, True), foreground=foreground)
        self.temperature = temperature
        self.foreground = foreground

    def forward(self, student: Dense, teacher: Dense) -> Tensor:
        bins = _bins(student, 'student'), _bins(teacher, 'teacher')
        weight = None
        if self.foreground:
            with full_precision(teacher.cls):
                # Before confidence() multiplies: in float16 the product of two small probabilities is 0.
                weight = teacher.float().confidence()
        return localization_distill(*bins, weight, temperature=self.temperature)

    def extra_repr(self) -> str:
        return describe(temperature=self.temperature, foreground=self.foreground)


def _bins(predictions: Dense, role: str) -> Tensor:
    if predictions.dist is None:
        raise DistillError(
            f"LocalizationDistillLoss needs heads that predict distance bins (GFL), but the {role}'s does "
            f'not{reason_for_absence(predictions, "dist")}; {_INSTEAD}.'
        )
    return predictions.dist
