"""Decoupled knowledge distillation: target class and non-target classes apart."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import aligned, check_not_negative, check_positive, describe, full_precision
from kd_plugins.losses._labels import class_shares
from kd_plugins.losses.base import DistillLoss

#: More are no mixture of images, and every one costs a pass over the logits.
_MOST_CLASSES = 8


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    r"""Weighted sum of the target class's KL divergence (TCKD) and that among the other classes (NCKD).

    .. math:: T^2 \left( \alpha \, \mathrm{KL}(b^t \,\|\, b^s) + \beta \, \mathrm{KL}(\hat p^t \,\|\, \hat p^s) \right)

    with :math:`b = (p_y, 1 - p_y)` and :math:`\hat p` the softmax over the classes other than :math:`y`, both of
    ``z / T``. Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022, arXiv 2203.08679), equation 7; classic KD is
    :math:`\alpha = 1, \beta = 1 - p^t_y`. The authors' code masks the target logit by -1000, here it is left out; their
    linear warm-up of the weight over the first 20 epochs is a schedule of the term's weight.

    Soft labels (Mixup, CutMix): the expectation of the loss over the classes that an image was mixed from,
    :math:`\sum_k q_k \, \mathrm{DKD}(y = k)` with :math:`q` the label less the floor of label smoothing (its smallest
    value), divided by its sum. The paper has hard labels only.

    With two classes the other class is alone, NCKD is exactly 0, and ``beta`` would do nothing: they are refused
    unless ``beta`` is 0. What is left, TCKD, is `kl_div`, whichever class is the true one.

    Reduction: sum over the classes, mean over all positions N.

    Args:
        student: ``(..., C)`` class logits, ``C >= 2``.
        teacher: ``(..., C)`` class logits; no gradient flows into it.
        target: ``(...)`` int64 true classes, or ``(..., C)`` soft labels that sum to 1, of at most 8 classes per
            position beside the floor.
        alpha: Weight of TCKD, >= 0.
        beta: Weight of NCKD, >= 0. The paper takes 8 for ResNet32x4 on CIFAR-100 and 0.5 on ImageNet.
        temperature: ``T`` > 0.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes or labels do not fit, or a hyper-parameter is out of range.
    """
    _check(alpha, beta, temperature)
    student, teacher = aligned(student, teacher, 'Class logits', 'map the classes by name first')
    count = student.shape[-1]
    if count < 2:
        raise DistillError(f'DKD needs at least 2 classes, got {count}.')
    if count == 2 and beta:
        raise DistillError(
            f'With 2 classes there is one other class, whose share of the others is always 1, so beta={beta!r} would '
            'do nothing; use KLDivLoss, or write beta=0, which is the same.'
        )
    shares = class_shares(target, student)
    with full_precision(student):
        student, teacher = student / temperature, teacher / temperature
        if shares is None:
            loss = _decoupled(student, teacher, target, alpha, beta)
        else:
            parts = [share * _decoupled(student, teacher, own, alpha, beta) for share, own in _mixed(shares)]
            loss = sum(parts[1:], parts[0])
        return temperature**2 * loss.sum() / max(loss.numel(), 1)


def _decoupled(student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float) -> Tensor:
    """``(...)`` loss of every position, of logits that are softened already."""
    loss = alpha * _kl(_binary(student, target), _binary(teacher, target))
    return loss + beta * _kl(_others(student, target), _others(teacher, target))


def _mixed(shares: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Share and class, ``(...)`` each: of every position the largest, the second, ... while any is left."""
    count = int((shares > 0).sum(-1).max()) if shares.numel() else 1
    if count > _MOST_CLASSES:
        raise DistillError(
            f'DKD is computed for every class that an image was mixed from, at most {_MOST_CLASSES}, but a soft label '
            f'has {count} classes above its smallest value; use KLDivLoss, which needs no labels.'
        )
    values, classes = shares.topk(count, -1)
    return zip(values.unbind(-1), classes.unbind(-1), strict=True)


def _kl(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def _without_target(logits: Tensor, target: Tensor) -> Tensor:
    """``(..., C - 1)`` logits of the other classes."""
    count = logits.shape[-1]
    index = torch.arange(count - 1, device=logits.device).expand(*logits.shape[:-1], count - 1)
    return logits.gather(-1, index + (index >= target.unsqueeze(-1)))


def _others(logits: Tensor, target: Tensor) -> Tensor:
    return _without_target(logits, target).log_softmax(-1)


def _binary(logits: Tensor, target: Tensor) -> Tensor:
    """``(..., 2)`` log-probabilities of the target class and of all others together."""
    own = logits.gather(-1, target.unsqueeze(-1))
    rest = _without_target(logits, target).logsumexp(-1, keepdim=True)
    return torch.cat([own, rest], -1).log_softmax(-1)


def _check(alpha: float, beta: float, temperature: float) -> None:
    check_not_negative(alpha=alpha, beta=beta)
    check_positive(temperature=temperature)
    if not (alpha or beta):
        raise DistillError('alpha and beta are both 0; at least one must be > 0.')


class DKDLoss(DistillLoss):
    """Module form of `dkd`, which see. Consumes ``(..., C)`` logits of classes that exclude each other, and labels.

    Args:
        alpha: Weight of the target class's divergence.
        beta: Weight of the divergence among the other classes.
        temperature: Softening of both.
    """

    consumes = 'logits'
    activation = 'softmax'
    needs_target = True

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        _check(alpha, beta, temperature)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        if target is None:
            raise DistillError('DKDLoss compares the true class with the others and needs labels; use KLDivLoss.')
        return dkd(student, teacher, target, alpha=self.alpha, beta=self.beta, temperature=self.temperature)

    def extra_repr(self) -> str:
        return describe(alpha=self.alpha, beta=self.beta, temperature=self.temperature)
