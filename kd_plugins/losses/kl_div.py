"""Classic knowledge distillation: KL divergence of softened class probabilities."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kd_plugins.losses._common import aligned, check_choice, check_positive, describe, full_precision
from kd_plugins.losses.base import DistillLoss


def kl_div(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    teacher_temperature: float | None = None,
) -> Tensor:
    r"""KL divergence of the teacher's softened probabilities from the student's.

    .. math:: T^2 \, \frac{1}{N} \sum_n \sum_c p^t_{nc} \log \frac{p^t_{nc}}{p^s_{nc}},
              \quad p^s = \operatorname{softmax}(z^s / T), \; p^t = \operatorname{softmax}(z^t / T_t)

    Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2: ``T^2`` keeps the
    gradient's size independent of the temperature. The cross-entropy of the paper is used less the teacher's
    entropy, which has no gradient, so that the loss is 0 at equality.

    ``standardize`` is logit standardisation, Sun et al., "Logit Standardization in Knowledge Distillation"
    (CVPR 2024, arXiv 2403.01427): both logit vectors are brought to zero mean and unit standard deviation over the
    classes before the division by ``temperature``, and the student need not reach the teacher's logit range. Here
    the standard deviation is the population's (divided by C); the authors' code divides by C - 1, which is
    the same as a temperature larger by ``sqrt(C / (C - 1))``.

    ``teacher_temperature`` softens the teacher otherwise than the student, e.g. one that is far more certain than the
    student can be. The factor stays ``T^2``, that of the student, through whose logits the gradient flows. The
    loss is then 0 at equal softened probabilities, not at equal logits.

    Reduction: sum over the classes, mean over all other positions N (not over classes: ``reduction='mean'`` of
    ``torch.nn.functional.kl_div`` is C times smaller; for a dense map its ``'batchmean'`` is H*W times larger).

    Args:
        student: ``(..., C)`` class logits.
        teacher: ``(..., C)`` class logits; no gradient flows into it.
        temperature: ``T`` > 0, of the student.
        standardize: Standardise the logits first. Temperatures of about 2 are usual then.
        teacher_temperature: ``T_t`` > 0, of the teacher. None: ``temperature``.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ, or a hyper-parameter is out of range.
    """
    _check(temperature, standardize, teacher_temperature)
    student, teacher = aligned(student, teacher, 'Class logits', 'map the classes by name first')
    with full_precision(student):
        if standardize:
            student, teacher = _standardized(student), _standardized(teacher)
        log_student = (student / temperature).log_softmax(-1)
        log_teacher = (teacher / (teacher_temperature or temperature)).log_softmax(-1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
        return temperature**2 * divergence.sum() / max(divergence.numel(), 1)


def _standardized(logits: Tensor) -> Tensor:
    centred = logits - logits.mean(-1, keepdim=True)
    # The floor is inside the root: the gradient of a bare root is nan for constant logits (a zero-initialised head).
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-14).rsqrt()


def _check(temperature: float, standardize: bool, teacher_temperature: float | None) -> None:
    check_positive(temperature=temperature)
    check_choice((False, True), standardize=standardize)
    if teacher_temperature is not None:
        check_positive(teacher_temperature=teacher_temperature)


class KLDivLoss(DistillLoss):
    """Module form of `kl_div`, which see. Consumes ``(..., C)`` logits of classes that exclude each other.

    Args:
        temperature: Softening of the student; a term's ``temperature`` schedule sets it.
        standardize: Logit standardisation.
        teacher_temperature: Softening of the teacher. None follows ``temperature``, also when that is scheduled.
    """

    consumes = 'logits'
    activation = 'softmax'

    def __init__(
        self, temperature: float = 4.0, standardize: bool = False, teacher_temperature: float | None = None
    ) -> None:
        super().__init__()
        _check(temperature, standardize, teacher_temperature)
        self.temperature = temperature
        self.standardize = standardize
        self.teacher_temperature = teacher_temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kl_div(student, teacher, **self._options())

    def extra_repr(self) -> str:
        return describe(**self._options())

    def _options(self) -> dict[str, Any]:
        return {
            'temperature': self.temperature,
            'standardize': self.standardize,
            'teacher_temperature': self.teacher_temperature,
        }
