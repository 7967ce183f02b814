"""Knowledge distillation for long-tailed data: the teacher's probabilities, balanced by how many images a class has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import aligned, check_not_negative, check_positive, describe, full_precision
from kd_plugins.losses.base import DistillLoss


def balanced_kl_div(
    student: Tensor,
    teacher: Tensor,
    counts: Sequence[int] | Tensor,
    *,
    temperature: float = 2.0,
    beta: float = 0.9999,
) -> Tensor:
    r"""KL divergence of the teacher's softened and balanced probabilities from the student's softened ones.

    .. math:: T^2 \, \frac{1}{N} \sum_n \sum_c \hat p_{nc} \log \frac{\hat p_{nc}}{p^s_{nc}},
              \quad \hat p_{nc} = \frac{w_c \, p^t_{nc}}{\sum_k w_k \, p^t_{nk}},
              \quad w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}

    Zhang et al., "Balanced Knowledge Distillation for Long-tailed Learning" (arXiv 2104.10510), section 3, with the
    weights of Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019, arXiv 1901.05555):
    the inverse of the effective number of images. What the weights are scaled by cancels out. It is 0 where the
    student agrees with the *balanced* teacher; equal logits give 0 only for equal counts. The paper's cross-entropy
    is used less the entropy of its target, which has no gradient.

    Reduction: sum over the classes, mean over the images N.

    Args:
        student: ``(..., C)`` class logits.
        teacher: ``(..., C)`` class logits; no gradient flows into it.
        counts: ``C`` numbers of training images; a class without any counts as one with one.
        temperature: ``T`` > 0, of both.
        beta: In [0, 1): 0 leaves the teacher as it is, towards 1 a class weighs as one over its number of images.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ, there is not one count per class, or a hyper-parameter is out of range.
    """
    _check(temperature, beta)
    return _balanced(student, teacher, balancing(counts, beta).to(student.device), temperature)


def balancing(counts: Sequence[int] | Tensor, beta: float = 0.9999) -> Tensor:
    """``(C,)`` logarithms of the weights of the classes, in float64 on the CPU.

    Args:
        counts: Training images of each class.
        beta: See `balanced_kl_div`.
    """
    number = torch.as_tensor(counts, dtype=torch.float64, device='cpu').clamp(min=1)
    # In float64: beta is close to 1, and its powers too for rare classes.
    return -(1 - beta**number).log()


def _balanced(student: Tensor, teacher: Tensor, log_weights: Tensor, temperature: float) -> Tensor:
    student, teacher = aligned(student, teacher, 'Class logits', 'map the classes by name first')
    if len(log_weights) != student.shape[-1]:
        raise DistillError(f'There are {student.shape[-1]} classes and {len(log_weights)} counts; give one for each.')
    with full_precision(student):
        log_student = (student / temperature).log_softmax(-1)
        # Logarithms of the weights are added where they multiply.
        log_teacher = ((teacher / temperature).log_softmax(-1) + log_weights.to(student.dtype)).log_softmax(-1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
        return temperature**2 * divergence.sum() / max(divergence.numel(), 1)


def _check(temperature: float, beta: float) -> None:
    check_positive(temperature=temperature)
    check_not_negative(beta=beta)
    if beta >= 1:
        raise DistillError(f'beta must be below 1, got {beta!r}: 0.9999 is usual, 0 balances nothing.')


def _whole(counts: Any) -> bool:
    if not isinstance(counts, Sequence) or isinstance(counts, str) or not counts:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts)


class BalancedKLDivLoss(DistillLoss):
    """Module form of `balanced_kl_div`, which see. Consumes ``(..., C)`` logits of classes that exclude each other.

    Args:
        temperature: Softening of both; a term's ``temperature`` schedule sets it.
        beta: How far the classes are balanced.
        counts: Training images of each class of the student. None: counted in the training set before the run.
    """

    consumes = 'logits'
    activation = 'softmax'

    def __init__(self, temperature: float = 2.0, beta: float = 0.9999, counts: Sequence[int] | None = None) -> None:
        super().__init__()
        _check(temperature, beta)
        if counts is not None and not _whole(counts):
            raise DistillError(f'counts must be whole numbers >= 0, one per class, or None, got {counts!r}.')
        self.temperature = temperature
        self.beta = beta
        self.counts = None if counts is None else list(counts)
        self._known: tuple[Sequence[int], Tensor] | None = None

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.counts is None:
            raise DistillError('BalancedKLDivLoss does not know the number of images of each class; give counts=[...].')
        if self._known is None or self._known[0] is not self.counts or self._known[1].device != student.device:
            # Moved once: a copy from the CPU makes the host wait for the GPU.
            self._known = self.counts, balancing(self.counts, self.beta).to(student.device)
        check_positive(temperature=self.temperature)
        return _balanced(student, teacher, self._known[1], self.temperature)

    def extra_repr(self) -> str:
        return describe(temperature=self.temperature, beta=self.beta)
