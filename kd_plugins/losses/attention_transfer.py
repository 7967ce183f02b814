"""Attention transfer: the spatial map of how strongly all channels together respond."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import vector_norm

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import aligned, as_full, check_choice, check_positive, describe, full_precision
from kd_plugins.losses.base import DistillLoss

FORMS = ('author', 'paper')


def attention_transfer(student: Tensor, teacher: Tensor, *, form: str = 'author', p: float = 2.0) -> Tensor:
    r"""Distance of two normalised attention maps; the channel counts may differ.

    .. math:: \text{paper: } \frac{1}{B} \sum_b \| q^s_b - q^t_b \|_2, \quad
              \text{author: } \frac{1}{B H W} \sum_b \| q^s_b - q^t_b \|_2^2, \quad
              q = \frac{Q}{\|Q\|_2}, \quad Q_i = \sum_c |f_{ci}|^p

    Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017, arXiv 1612.03928), equation 2, with the
    activation-based mapping ``F_sum^p``. The factor ``beta / 2`` of equation 2 belongs to the term's weight. The
    authors' code squares the norm and divides it by the number of positions; ``form='author'`` does the same. It takes
    the mean over the channels for ``Q``, which the normalisation makes equal to the sum.

    The two forms are not one up to a factor: the gradient of ``'paper'`` keeps its size as the maps approach each
    other, that of ``'author'`` vanishes.

    Neither the sign nor the magnitude of the features matters. A map of zeros (dead ReLUs) has no attention; it stays
    zero, without gradient.

    Reduction: ``'author'``: mean over positions and images; ``'paper'``: norm over the positions, mean over images.

    Args:
        student: ``(B, C, H, W)`` features, or ``(B, C, ...)`` with at least one spatial dimension.
        teacher: ``(B, C', H, W)`` features on the same grid; no gradient flows into it.
        form: ``'author'`` or ``'paper'``.
        p: Power of the activations, >= 1. The larger it is, the more the strongest responses count.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Batch sizes or grids differ, or a hyper-parameter is out of range.
    """
    _check(form, p)
    for role, features in (('student', student), ('teacher', teacher)):
        if not isinstance(features, Tensor):
            raise DistillError(f'Features of the {role} must be one tensor, got {type(features).__name__}.')
        if features.dim() < 3:
            raise DistillError(f'Features of the {role} must be maps, (B, C, H, W), got {tuple(features.shape)}.')
    with full_precision(student):
        advice = "only the channel counts may differ; adapter='auto' brings the grids together"
        student, teacher = aligned(_attention(student, p), _attention(teacher.detach(), p), 'Attention maps', advice)
        difference = (student - teacher).flatten(1)
        if form == 'author':
            return difference.square().sum() / max(difference.numel(), 1)
        # Its gradient at 0 is 0 in torch; that of a bare root would be nan.
        return vector_norm(difference, dim=-1).sum() / max(len(difference), 1)


def _attention(features: Tensor, p: float) -> Tensor:
    """``(B, C, H, W)`` to the ``(B, H, W)`` attention of unit norm."""
    features = as_full(features).abs()
    # The normalised map does not depend on the scale, so this one needs no gradient; without it powers overflow.
    largest = features.detach().amax(tuple(range(1, features.dim())), keepdim=True).clamp(min=1e-12)
    attention = (features / largest).pow(p).sum(1)
    squares = attention.square().sum(tuple(range(1, attention.dim())), keepdim=True)
    # Only a map of zeros is below the floor; clamp, unlike a sum, leaves it without a gradient.
    return attention * squares.clamp(min=1e-24).rsqrt()


def _check(form: str, p: float) -> None:
    check_choice(FORMS, form=form)
    check_positive(p=p)
    if p < 1:
        raise DistillError(f'p must be >= 1, below which the gradient at 0 is infinite, got {p!r}.')


class AttentionTransferLoss(DistillLoss):
    """Module form of `attention_transfer`, which see. Needs equal grids but no equal channels.

    Args:
        form: ``'author'`` for the authors' code, ``'paper'`` for their equation.
        p: Power of the activations.
    """

    consumes = 'features'
    any_channels = True

    def __init__(self, form: str = 'author', p: float = 2.0) -> None:
        super().__init__()
        _check(form, p)
        self.form = form
        self.p = p

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_transfer(student, teacher, form=self.form, p=self.p)

    def extra_repr(self) -> str:
        return describe(form=self.form, p=self.p)
