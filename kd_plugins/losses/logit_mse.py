"""Logit regression: mean squared error of class logits, the teacher's scaled down."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.losses._common import aligned, check_positive, describe, full_precision
from kd_plugins.losses.base import DistillLoss


def logit_mse(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Mean squared difference of the student's logits and the teacher's, which are divided by a temperature.

    .. math:: \frac{1}{N C} \sum_n \sum_c \left( z^s_{nc} - \frac{z^t_{nc}}{T} \right)^2

    Ba and Caruana, "Do Deep Nets Really Need to be Deep?" (NeurIPS 2014, arXiv 1312.6184), equation 1, at ``T =
    1``. With a ``T`` that falls from ``T_max`` to 1 it is the first stage of Jafari et al., "Annealing Knowledge
    Distillation" (EACL 2021, arXiv 2104.07163): first a smooth teacher, in the end the teacher itself. The student
    learns logits of the size that it is shown; its own are not divided. It is 0 where the student has them.

    Reduction: mean over classes and over all other positions.

    Args:
        student: ``(..., C)`` class logits.
        teacher: ``(..., C)`` class logits; no gradient flows into it.
        temperature: ``T`` > 0, of the teacher alone.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ, or the temperature is out of range.
    """
    check_positive(temperature=temperature)
    student, teacher = aligned(student, teacher, 'Class logits', 'map the classes by name first')
    with full_precision(student):
        return (student - teacher / temperature).square().sum() / max(student.numel(), 1)


class LogitMSELoss(DistillLoss):
    """Module form of `logit_mse`, which see. Consumes ``(..., C)`` logits of any kind.

    Args:
        temperature: What the teacher's logits are divided by; a term's ``temperature`` schedule sets it.
    """

    consumes = 'logits'

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return logit_mse(student, teacher, temperature=self.temperature)

    def extra_repr(self) -> str:
        return describe(temperature=self.temperature)
