"""Correlation of class probabilities: what a much stronger teacher ranks alike, not its exact probabilities."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import aligned, check_not_negative, check_positive, describe, full_precision
from kd_plugins.losses.base import DistillLoss


def dist(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    r"""One minus the Pearson correlation of class probabilities, over the classes and over the batch.

    .. math:: T^2 \left( \frac{\beta}{N} \sum_n (1 - r(p^s_{n,:}, p^t_{n,:}))
              + \frac{\gamma}{C} \sum_c (1 - r(p^s_{:,c}, p^t_{:,c})) \right), \quad p = \operatorname{softmax}(z / T)

    Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022, arXiv 2205.10536): the first part
    (inter-class) keeps the teacher's relations between the classes of an image, the second (intra-class) those between
    the images of a batch for one class.

    Deviations: half the squared difference of the vectors brought to zero mean and unit length is computed, which is
    1 - r, and exactly 0 at equality. The authors add 1e-8 to the product of both lengths; here it is added to both
    squared lengths, which is the same where student and teacher vary alike. So classes that the teacher (nearly)
    excludes for the whole batch fade out, with a finite gradient. A row or column that is constant in one of the two
    counts 1/2, one that is constant in both counts 0.

    Two vectors of two values always correlate by 1 or -1, which has no gradient: two classes are refused unless
    ``beta`` is 0, and the intra-class part wants 3 positions or more. It is exactly 0, with a gradient of 0, for a
    batch of a single position (the last one of an epoch).

    Reduction: mean over all positions N of the first part, mean over the classes of the second. Positions are coupled:
    the loss of a batch is not the mean of its images' losses, and with several processes every one relates its own.

    Args:
        student: ``(..., C)`` class logits; everything before C is a position (image, pixel, anchor).
        teacher: ``(..., C)`` class logits; no gradient flows into it.
        beta: Weight of the inter-class part, >= 0.
        gamma: Weight of the intra-class part, >= 0.
        temperature: ``T`` > 0.

    Returns:
        Scalar between 0 and ``2 T^2 (beta + gamma)``, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ, a hyper-parameter is out of range, or there are too few classes.
    """
    _check(beta, gamma, temperature)
    student, teacher = aligned(student, teacher, 'Class logits', 'map the classes by name first')
    count = student.shape[-1]
    if count < 2:
        raise DistillError(f'DIST needs at least 2 classes, got {count}.')
    if count == 2 and beta:
        raise DistillError(
            f'With 2 classes the inter-class correlation is always 1 or -1 and teaches nothing, so beta={beta!r} would '
            'do nothing; use KLDivLoss, or write beta=0.'
        )
    with full_precision(student):
        student, teacher = ((z / temperature).softmax(-1).reshape(-1, count) for z in (student, teacher))
        return temperature**2 * (beta * _distance(student, teacher) + gamma * _distance(student.T, teacher.T))


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - r over the rows."""
    return (_unit(student) - _unit(teacher)).square().sum() / (2 * max(len(student), 1))


def _unit(rows: Tensor) -> Tensor:
    """Zero mean and unit length."""
    centred = rows - rows.mean(-1, keepdim=True)
    # Inside the root: the gradient of a bare root is nan for a constant row, and rounding errors would be scaled up.
    return centred * (centred.square().sum(-1, keepdim=True) + 1e-8).rsqrt()


def _check(beta: float, gamma: float, temperature: float) -> None:
    check_not_negative(beta=beta, gamma=gamma)
    check_positive(temperature=temperature)
    if not (beta or gamma):
        raise DistillError('beta and gamma are both 0; at least one must be > 0.')


class DISTLoss(DistillLoss):
    """Module form of `dist`, which see. Consumes ``(..., C)`` logits of classes that exclude each other.

    Args:
        beta: Weight of the correlation over the classes.
        gamma: Weight of the correlation over the batch.
        temperature: Softening of both.
    """

    consumes = 'logits'
    activation = 'softmax'

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        _check(beta, gamma, temperature)
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return dist(student, teacher, beta=self.beta, gamma=self.gamma, temperature=self.temperature)

    def extra_repr(self) -> str:
        return describe(beta=self.beta, gamma=self.gamma, temperature=self.temperature)
