"""One-for-all distillation between architectures: the true class counts more, the surer the teacher is of it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import aligned, check_choice, check_positive, describe, full_precision
from kd_plugins.losses._labels import class_shares
from kd_plugins.losses.base import DistillLoss


def ofa(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.0,
    temperature: float = 1.0,
    form: str = 'paper',
) -> Tensor:
    r"""Cross-entropy with the teacher's probabilities, enhanced at the true class.

    .. math:: -\frac{T^2}{N} \sum_n \Big( (1 + p^t_{ny})^\gamma \log p^s_{ny}
              + \sum_{c \ne y} p^t_{nc} \log p^s_{nc} \Big), \quad p = \operatorname{softmax}(z / T)

    Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation" (NeurIPS
    2023, arXiv 2310.19444), adaptive target enhancement. At ``gamma`` 1 it is the cross-entropy with the label plus
    that with the teacher. So this form (``'paper'``) brings a cross-entropy with the label of its own, as a
    branch on inner features needs it.

    ``form='author'`` is the released code, for a student whose own loss is that cross-entropy: the factor of the true
    class is :math:`(1 + p^t_{ny})^\gamma - 1`, and the other factors are :math:`(p^t_{nc})^\gamma`. At ``gamma`` 1 it
    is `kl_div` plus the teacher's entropy. Deviations from the code: ``T^2``, which it has not (it is used
    with ``T`` 1), and mixed labels, of which it takes the largest class.

    Soft labels (Mixup, CutMix): the expectation of the loss over the classes that an image was mixed from, label
    smoothing taken off (with two classes it cannot be told from mixing and stays).

    A cross-entropy: it is not 0 when student and teacher are equal, but least (and above 0) when the student's
    probabilities are the factors divided by their sum.

    Reduction: sum over the classes, mean over all positions N.

    Args:
        student: ``(..., C)`` class logits.
        teacher: ``(..., C)`` class logits; no gradient flows into it.
        target: ``(...)`` int64 true classes, or ``(..., C)`` soft labels that sum to 1.
        gamma: Enhancement > 0; the paper tries 1 to 2.
        temperature: ``T`` > 0.
        form: ``'paper'`` or ``'author'``.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes or labels do not fit, or a hyper-parameter is out of range.
    """
    _check(gamma, temperature, form)
    student, teacher = aligned(student, teacher, 'Class logits', 'map the classes by name first')
    shares = class_shares(target, student)
    if shares is None:
        shares = one_hot(target, student.shape[-1]).to(student.dtype)
    with full_precision(student):
        taught = (teacher / temperature).softmax(-1)
        enhanced, others = (1 + taught) ** gamma, taught
        if form == 'author':
            enhanced, others = enhanced - 1, taught**gamma
        factors = shares * enhanced + (1 - shares) * others
        loss = -(factors * (student / temperature).log_softmax(-1)).sum(-1)
        return temperature**2 * loss.sum() / max(loss.numel(), 1)


def _check(gamma: float, temperature: float, form: str) -> None:
    check_positive(gamma=gamma, temperature=temperature)
    check_choice(('paper', 'author'), form=form)


class OFALoss(DistillLoss):
    """Module form of `ofa`, which see. Consumes ``(..., C)`` logits of classes that exclude each other, and labels.

    Args:
        gamma: Enhancement of the true class.
        temperature: Softening of both sides.
        form: ``'paper'``, or ``'author'`` beside a cross-entropy of the student's own.
    """

    consumes = 'logits'
    activation = 'softmax'
    needs_target = True

    def __init__(self, gamma: float = 1.0, temperature: float = 1.0, form: str = 'paper') -> None:
        super().__init__()
        _check(gamma, temperature, form)
        self.gamma = gamma
        self.temperature = temperature
        self.form = form

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        if target is None:
            raise DistillError('OFALoss enhances the true class and needs labels; use KLDivLoss.')
        return ofa(student, teacher, target, gamma=self.gamma, temperature=self.temperature, form=self.form)

    def extra_repr(self) -> str:
        return describe(gamma=self.gamma, temperature=self.temperature, form=self.form)
