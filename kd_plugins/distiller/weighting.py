"""How much each image of a batch counts in a term."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd_plugins.distiller.kinds import build_kind, register_in
from kd_plugins.errors import DistillError
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
    return register_in(_KINDS, name)


def build_weighting(value: Any, where: str) -> Weighting | None:
    """Read a term's ``samples``.

    Raises:
        DistillError: There is no such weighting, or it does not take these options.
    """
    return None if value is None else build_kind(_KINDS, value, where)


def _logits(
    student: Form, teacher: Form, name: str, target: Tensor | None = None, labels: bool = False
) -> list[Tensor]:
    """``(B, C)`` class logits of both in single precision, and that there are labels where they are needed.

    Raises:
        DistillError: They are of no classifier whose classes exclude each other.
    """
    kinds = {getattr(p, 'activation', 'softmax') for p in (student, teacher)}
    if (labels and target is None) or not student.has_class_logits or student.source.dim() != 2 or 'sigmoid' in kinds:
        what = 'compares with the labels of whole images' if labels else 'looks at one distribution per image'
        raise DistillError(f'samples={name!r} {what}; take it for classifiers whose classes exclude each other.')
    return [p.source.float() for p in (student, teacher)]


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
        logits = _logits(student, teacher, 'wsl', target, labels=True)
        assert target is not None
        ours, theirs = (cross_entropy(found, target, reduction='none') for found in logits)
        return 1 - (-ours / theirs.clamp(min=torch.finfo(theirs.dtype).tiny)).exp()

    def __str__(self) -> str:
        return 'weighted soft labels'


@register_weighting('confidence')
class TeacherConfidence:
    r"""Images count as much as the teacher is sure of its first choice.

    .. math:: w_i = \max_c p^t_{ic}

    The teacher's softmax at temperature 1; no labels are needed.
    """

    needs_target = False

    @torch.no_grad()
    def __call__(self, student: Form, teacher: Form, target: Tensor | None) -> Tensor:
        """The weights, in (1 / C, 1]."""
        return _logits(student, teacher, 'confidence')[1].softmax(-1).amax(-1)

    def __str__(self) -> str:
        return "the teacher's confidence"


@register_weighting('entropy')
class TeacherCertainty:
    r"""Images count the less the more open the teacher's choice is: fully where it is one class, not where it is any.

    .. math:: w_i = 1 + \frac{1}{\log C} \sum_c p^t_{ic} \log p^t_{ic}

    The teacher's softmax at temperature 1; no labels are needed.
    """

    needs_target = False

    @torch.no_grad()
    def __call__(self, student: Form, teacher: Form, target: Tensor | None) -> Tensor:
        """The weights, in [0, 1]."""
        log = _logits(student, teacher, 'entropy')[1].log_softmax(-1)
        entropy = -(log.exp() * log).sum(-1)
        return (1 - entropy / math.log(max(log.shape[-1], 2))).clamp(min=0)

    def __str__(self) -> str:
        return "one minus the teacher's entropy"


@register_weighting('agreement')
class AgreementWithLabels:
    """Images count where the teacher's first choice is the label; of mixed labels, as much as they hold of it."""

    needs_target = True

    @torch.no_grad()
    def __call__(self, student: Form, teacher: Form, target: Tensor | None) -> Tensor:
        """The weights; ``target`` is ``(B,)`` classes, or ``(B, C)`` mixed ones."""
        choice = _logits(student, teacher, 'agreement', target, labels=True)[1].argmax(-1)
        assert target is not None
        if target.dim() == 1:
            return (choice == target).float()
        return target.float().gather(-1, choice[:, None])[:, 0]

    def __str__(self) -> str:
        return 'where the teacher agrees with the label'
