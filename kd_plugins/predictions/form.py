"""What a canonical form of predictions is: everything that the engine has to know about one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from kd_plugins.errors import DistillError, nearest
from kd_plugins.losses._common import as_full
from kd_plugins.losses.base import CONSUMES, Declaration

#: ``(student_index, teacher_index)`` of the classes that are compared; None: all, in the same order.
Classes = tuple[Sequence[int], Sequence[int]] | None
F = TypeVar('F', bound='Form')

_FORMS: dict[str, type[Form]] = {}


@dataclasses.dataclass(frozen=True)
class Form:
    """Predictions of one head for one batch, whoever made it. A new form is a subclass in a file of its own.

    Instances are immutable dataclasses.

    Attributes:
        name: What a loss that takes such predictions whole writes as its ``consumes``.
        head: What heads of this form are called in messages, e.g. ``'detection'``.
        decoding: Methods that give a head's outputs their meaning: a class that overrides one between the head and the
            class that a reader was written for has outputs that the reader would misread.
        by_class: Whether two of them are compared class by class, so that the classes of both must be matched.
        has_class_logits: Whether losses on logits compare it, by its class logits.
        as_maps: Whether losses on features compare it, by `maps`, class by class.
        unbatched: Fields whose tensors are the same for all images.
        trains_alone: Whether a head may train while the rest of its model does not, to return what it does there.
        repeated: Whether a head may run more than once in a forward pass; its first call counts.
    """

    name: ClassVar[str]
    head: ClassVar[str]
    decoding: ClassVar[tuple[str, ...]] = ()
    by_class: ClassVar[bool] = True
    has_class_logits: ClassVar[bool] = False
    as_maps: ClassVar[bool] = False
    unbatched: ClassVar[tuple[str, ...]] = ()
    trains_alone: ClassVar[bool] = False
    repeated: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        known = _FORMS.get(cls.name)
        # The same class once more is a module that was imported again.
        if cls.name in CONSUMES or (known is not None and _path(known) != _path(cls)):
            raise DistillError(f'{_path(cls)}: the name {cls.name!r} of a form is taken; give it another one.')
        _FORMS[cls.name] = cls

    @classmethod
    def align(cls: type[F], student: F, teacher: F, classes: Classes = None) -> tuple[F, F]:
        """Make two heads' predictions comparable: the same positions, classes and activation.

        Args:
            student: Predictions of the student; gradients flow through what is returned.
            teacher: Predictions of the teacher for the same images, detached.
            classes: The classes that correspond.

        Raises:
            DistillError: They cannot be compared.
        """
        raise NotImplementedError

    @classmethod
    def compare(
        cls: type[F],
        loss: nn.Module,
        declared: Declaration,
        student: F,
        teacher: F,
        target: Tensor | None = None,
        classes: Classes = None,
    ) -> Tensor:
        """What a loss says of two aligned predictions; as it stands here, one that is written for this form.

        Args:
            loss: The loss.
            declared: What it takes.
            student: Aligned predictions of the student.
            teacher: Aligned predictions of the teacher.
            target: Labels of the batch in the student's classes, or None.
            classes: The classes that were aligned.

        Returns:
            Scalar.

        Raises:
            DistillError: The loss does not suit these heads.
        """
        return loss(student, teacher, target) if declared.needs_target else loss(student, teacher)

    @classmethod
    def needs_labels(cls, classes: Classes) -> bool:
        """Whether losses without a target need the labels too, e.g. to leave out images of unknown classes."""
        return False

    @classmethod
    def compared_labels(cls, target: Tensor | None, classes: Classes) -> tuple[Tensor | None, Tensor | None]:
        """Labels of whole images in terms of the classes that are compared.

        Args:
            target: Labels of the batch in the student's classes, or None.
            classes: The classes that were aligned.

        Returns:
            The labels, and a ``(B,)`` bool mask of the images that count; None: all.
        """
        return target, None

    @classmethod
    def average(cls: type[F], predictions: Sequence[F]) -> F:
        """What several teachers predict together: the mean of their probabilities; see `common_shape`.

        Args:
            predictions: Of each teacher, detached, aligned to the same student.

        Raises:
            DistillError: There is no such mean of this form, or they are not of the same places and classes.
        """
        raise DistillError(
            f'predictions of {cls.head} heads have no mean; write one term for each teacher, e.g. '
            "big=dict(..., teacher='big:head'), small=dict(..., teacher='small:head')."
        )

    @property
    def source(self) -> Tensor:
        """The tensor that carries the student's gradient if any does."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """Every prediction, which must be finite."""
        return [v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Tensor)]

    @property
    def besides(self) -> tuple[str, ...]:
        """What the head predicts besides that is not in here, in words, for the summary; there it is left out where a
        form of that name is taught."""
        return ()

    def describe(self) -> str:
        """In words, for the summary."""
        raise NotImplementedError

    def maps(self: F, other: F) -> tuple[Tensor, Tensor]:
        """``(B, C, H, W)`` of this and of other aligned predictions, for losses on features."""
        raise NotImplementedError

    def made_of(self, tensor: Tensor) -> bool:
        """Whether a tensor holds (some of) the class logits of these predictions: it comes from the layer that makes
        them."""
        return False

    def in_full_precision(self: F) -> F:
        """In float32 (float64 stays); itself, where the losses see to that."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tensors = {n: v for n, v in found.items() if isinstance(v, Tensor) and v.is_floating_point()}
        changes = {n: cast for n, v in tensors.items() if (cast := as_full(v)) is not v}
        return self.replace(**changes) if changes else self

    def image(self: F, index: int) -> F:
        """The predictions for one image, as a batch of one."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.unbatched}
        return self.replace(**{n: v[index : index + 1] for n, v in found.items() if isinstance(v, Tensor)})

    def replace(self: F, **changes: Any) -> F:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def detach(self: F) -> F:
        """Cut from the autograd graph."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changes = {n: v.detach() for n, v in found.items() if isinstance(v, Tensor) and v.requires_grad}
        return self.replace(**changes) if changes else self


def _path(form: type[Form]) -> str:
    return f'{form.__module__}.{form.__qualname__}'


def forms() -> tuple[type[Form], ...]:
    """Every form there is, in the order in which they became known."""
    return tuple(_FORMS.values())


def form_named(name: str, where: str = 'consumes') -> type[Form]:
    """The form of a name.

    Raises:
        DistillError: There is none.
    """
    if name not in _FORMS:
        raise DistillError(f'{where} names no form of predictions: {name!r}; {nearest(name, _FORMS)}')
    return _FORMS[name]


def common_shape(predictions: Sequence[Form], tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The shape of one tensor of each of several teachers, when it is the same.

    Raises:
        DistillError: It is not.
    """
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) > 1:
        shown = '; '.join(dict.fromkeys(p.describe() for p in predictions))
        raise DistillError(
            f'there is no mean of predictions at different places or of different classes ({shown}); write one term '
            'for each teacher.'
        )
    return shapes[0]


def mean_of_softmax(logits: Sequence[Tensor], dim: int = -1) -> Tensor:
    """Logits whose softmax is the mean of the softmax of each."""
    return torch.stack([as_full(z).log_softmax(dim) for z in logits]).logsumexp(0) - math.log(len(logits))


def mean_of_sigmoid(logits: Sequence[Tensor]) -> Tensor:
    """Logits whose sigmoid is the mean of the sigmoid of each; from logarithms, so that none of them rounds to 1."""
    found = torch.stack([as_full(z) for z in logits])
    # logit(mean) = log(sum of p) - log(sum of 1 - p): the number of them cancels out.
    return logsigmoid(found).logsumexp(0) - logsigmoid(-found).logsumexp(0)


def refuse_activation(loss: nn.Module, activation: str, of: str, advice: str) -> DistillError:
    """The error for a loss on classes of another kind."""
    words = {'softmax': 'a softmax together', 'sigmoid': 'a sigmoid each', 'probability': 'a sigmoid each'}
    return DistillError(
        f'{type(loss).__name__} does not suit {of}, whose classes are {words[activation]}; write {advice}.'
    )
