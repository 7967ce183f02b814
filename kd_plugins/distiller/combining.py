"""What a term makes of several teachers that say the same kind of thing of the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd_plugins.distiller.kinds import build_kind, register_in
from kd_plugins.errors import DistillError
from kd_plugins.predictions import Classes, Form


class Compared(NamedTuple):
    """What is compared with one teacher, or what several of them come to.

    Attributes:
        student: The student's predictions.
        teacher: The teacher's, aligned to them.
        classes: The classes that were aligned; None: all, in the same order.
        weights: ``(B,)`` how much every image counts in a mean over all of them, None: all that count alike.
    """

    student: Form
    teacher: Form
    classes: Classes = None
    weights: Tensor | None = None


class Combination(Protocol):
    """Makes of the teachers of a term what the student is compared with. ``str()`` of it says it in the summary.

    Attributes:
        needs_target: Whether it looks at the labels.
    """

    needs_target: bool

    def __call__(self, each: Sequence[Compared], target: Tensor | None) -> Sequence[Compared]:
        """What the loss is asked for; the term is the sum of its answers.

        Args:
            each: Every teacher's, in the order in which the term names them.
            target: Labels of the batch in the student's classes, or None.

        Raises:
            DistillError: These cannot be combined.
        """
        ...


_KINDS: dict[str, Callable[..., Combination]] = {}


def register_combination(name: str) -> Callable[[type], type]:
    """Decorator for a `Combination`; a term takes it as ``combine=dict(type=name, **options)``."""
    return register_in(_KINDS, name)


def build_combination(value: Any, where: str) -> Combination:
    """Read a term's ``combine``.

    Raises:
        DistillError: There is no such combination, or it does not take these options.
    """
    return build_kind(_KINDS, value, where)


@register_combination('mean')
class MeanOfTeachers:
    r"""The mean of the teachers' probabilities is what the student learns.

    .. math:: p^t = \frac{1}{K} \sum_k p^{t_k}

    Probabilities and not logits, whose scales differ from one network to the next: one that is sure of itself would
    outvote the others. The loss is given :math:`\log p^t` as logits, so a temperature softens the mean. Such committees
    teach e.g. in You et al., "Learning from Multiple Teacher Networks" (KDD 2017); what the mean of a form is, its
    `Form.average` says.
    """

    needs_target = False

    def __call__(self, each: Sequence[Compared], target: Tensor | None) -> Sequence[Compared]:
        """One comparison, with the mean.

        Raises:
            DistillError: The teachers do not predict the same classes at the same places.
        """
        first, form = each[0], type(each[0].teacher)
        known = {None if c.classes is None else tuple(c.classes[0]) for c in each}
        if len(known) > 1:
            raise DistillError(
                "combine='mean' averages what the teachers say of the same classes, and these know different ones of "
                "the student's; write one term for each teacher."
            )
        # Again: where the kinds of the teachers differ, so does what the student was brought to for each.
        student, teacher = form.align(first.student, form.average([c.teacher for c in each]))
        return [first._replace(student=student, teacher=teacher)]

    def __str__(self) -> str:
        return 'mean of their probabilities'


@register_combination('confidence')
class ConfidenceOfTeachers:
    r"""Each teacher teaches an image as much as it is right about it, compared with the others.

    .. math:: w_{ki} = \frac{1}{K - 1} \Bigl(1 - \frac{\exp \mathrm{CE}(z^{t_k}_i, y_i)}
              {\sum_j \exp \mathrm{CE}(z^{t_j}_i, y_i)}\Bigr), \quad L = \frac{1}{N} \sum_i \sum_k w_{ki} L_{ki}

    Zhang et al., "Confidence-Aware Multi-Teacher Knowledge Distillation" (CA-MKD, ICASSP 2022, arXiv 2201.00007),
    section 3, at temperature 1; the weights of an image add up to 1. An image of a class that a teacher does
    not know is left to the others, one that nobody knows is no part of the mean. For classifiers whose classes exclude
    each other.
    """

    needs_target = True

    @torch.no_grad()
    def __call__(self, each: Sequence[Compared], target: Tensor | None) -> Sequence[Compared]:
        """One comparison per teacher, with weights of the images.

        Raises:
            DistillError: There are no labels, or the predictions are of another kind.
        """
        kinds = {getattr(c.teacher, 'activation', 'softmax') for c in each}
        if target is None or 'sigmoid' in kinds or any(c.teacher.source.dim() != 2 for c in each):
            raise DistillError(
                "combine='confidence' asks how right each teacher is about the label of an image; take it for "
                "classifiers whose classes exclude each other, or combine='mean'."
            )
        errors, knows = [], []
        for student, teacher, classes, _ in each:
            labels, known = type(student).compared_labels(target, classes)
            assert labels is not None
            # An image of an unknown class stands for the first one here; it is masked below.
            errors.append(cross_entropy(teacher.source.float(), labels, reduction='none'))
            knows.append(torch.ones_like(errors[-1], dtype=torch.bool) if known is None else known)
        known, error = torch.stack(knows), torch.stack(errors)
        number = known.sum(0)
        # Where nobody knows, all would be masked, and a softmax of nothing is nan.
        share = error.masked_fill(~known, -torch.inf).masked_fill(number == 0, 0).softmax(0)
        weights = torch.where(number > 1, (1 - share) / (number - 1).clamp(min=1), 1.0) * known
        # The mean is over the images that anybody knows.
        weights = weights * (len(number) / (number > 0).sum().clamp(min=1))
        return [c._replace(weights=w) for c, w in zip(each, weights, strict=True)]

    def __str__(self) -> str:
        return 'each by its confidence in the label'
