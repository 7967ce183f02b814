"""How much each image of a batch counts in a term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd_plugins.errors import DistillError, in_words, nearest
from kd_plugins.predictions import Form


class Weighting(Protocol):
    """Weights of the images of a batch. ``str()`` of it says it in the summary.

    Attributes:
        needs_target: Whether it looks at the labels.
    """

    needs_target: bool

    def __call__(self, student: Form, teacher: Form, target: Tensor | None) -> Tensor:
        """``(B,)`` weights >= 0 from aligned predictions; no gradient flows through them."""
        ...


_KINDS: dict[str, Callable[..., Weighting]] = {}


def register_weighting(name: str) -> Callable[[type], type]:
    """Decorator for a `Weighting`; a term takes it as ``samples=dict(type=name, **options)``."""

    def decorate(cls: type) -> type:
        _KINDS[name] = cls
        return cls

    return decorate


def build_weighting(value: Any, where: str) -> Weighting | None:
    """Read a term's ``samples``.

    Raises:
        DistillError: There is no such weighting, or it does not take these options.
    """
    if value is None:
        return None
    options = dict(value) if isinstance(value, Mapping) else {'type': value}
    kind = options.pop('type', None)
    if kind not in _KINDS:
        raise DistillError(f'{where} has no type {kind!r}: {nearest(kind, _KINDS)}')
    try:
        return _KINDS[kind](**options)
    except TypeError as error:
        raise DistillError(f'{where} ({kind}) does not take these options: {in_words(error)}.') from error


@register_weighting('wsl')
class WeightedSoftLabels:
    r"""Images that the student finds as easy as the teacher does count less.

    .. math:: w_i = 1 - \exp(-\mathrm{CE}(z^s_i, y_i) / \mathrm{CE}(z^t_i, y_i))

    Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective" (ICLR 2021,
    arXiv 2102.00650), equation 9. For classifiers whose classes exclude each other.
    """

    needs_target = True

    @torch.no_grad()
    def __call__(self, student: Form, teacher: Form, target: Tensor | None) -> Tensor:
        """The weights; ``target`` is ``(B,)`` classes, or ``(B, C)`` mixed ones."""
        if target is None or not student.has_class_logits or student.source.dim() != 2:
            raise DistillError("samples='wsl' compares with the labels of whole images; take it for classifiers.")
        ours, theirs = (cross_entropy(p.source.float(), target, reduction='none') for p in (student, teacher))
        return 1 - (-ours / theirs.clamp(min=torch.finfo(theirs.dtype).tiny)).exp()

    def __str__(self) -> str:
        return 'weighted soft labels'
