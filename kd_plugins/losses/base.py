"""What a distillation loss says of itself: what it compares, and what it leaves to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from kd_plugins.errors import DistillError

#: What a loss may be given, see `DistillLoss.consumes`. Forms of predictions add their own names.
CONSUMES = ('features', 'logits')
ACTIVATIONS = (None, 'softmax', 'sigmoid')


class DistillLoss(nn.Module):
    """Base of all losses here; ``forward(student, teacher)`` returns a scalar.

    A loss of one's own may inherit from it or not: these attributes are what the engine asks for, and an ``nn.Module``
    without them is taken for a loss on features.

    Attributes:
        consumes: ``'features'`` (two tensors, brought to one shape by an adapter), ``'logits'`` (two ``(..., C)``
            tensors), or the name of a form of predictions (`kd_plugins.predictions.Form`), two of which it is given
            whole and aligned: ``'predictions'`` (dense detection heads), ``'segmentation'``, ``'masks'``.
        needs_target: Whether ``forward`` takes the labels as its third argument.
        activation: The classes whose logits it was written for: ``'softmax'`` (they exclude each other), ``'sigmoid'``
            (each is a yes or no), or None for any.
        any_channels: Whether the channels of two features may differ.
        any_grid: Whether the grids of two features may differ.
        images: How many images a batch must have for the loss to say anything: more than one where it compares the
            images of a batch with each other.
        counts: Of losses that balance classes: the number of training images of each class that is compared. None
            asks the engine for them, which sets it before the run.
    """

    consumes: ClassVar[str] = 'features'
    needs_target: ClassVar[bool] = False
    activation: str | None = None
    any_channels: ClassVar[bool] = False
    any_grid: ClassVar[bool] = False
    images: int = 1

    def for_channels(self, channels: int) -> nn.Module:
        """The loss for teacher features of so many channels: itself, unless it has parts of that size to train."""
        return self

    def for_predictions(self, student: Any, teacher: Any) -> nn.Module:
        """The loss for two aligned predictions, seen once before training: itself, unless it stands for others."""
        return self


@dataclass(frozen=True)
class Declaration:
    """What a loss declares, see `DistillLoss`; made once per term.

    Attributes:
        images: Two where the loss does not say: a check on one image would tell it wrong.
        built_per_level: Whether ``for_channels`` makes a loss of its own for every level.
        stands_for_another: Whether ``for_predictions`` returns the loss that is meant.
        balances: Whether it has ``counts``.
        takes_predictions: Whether it has a ``from_predictions(student, teacher)`` for whole detection heads.
    """

    consumes: str = 'features'
    needs_target: bool = False
    activation: str | None = None
    any_channels: bool = False
    any_grid: bool = False
    images: int = 2
    built_per_level: bool = False
    takes_predictions: bool = False
    stands_for_another: bool = False
    balances: bool = False


class Extras(Protocol):
    """What a loss may have beyond ``forward``: for type checkers, where it is known that it has it."""

    temperature: float
    counts: Sequence[int] | None

    def for_channels(self, channels: int) -> nn.Module: ...

    def for_predictions(self, student: Any, teacher: Any) -> nn.Module: ...

    def from_predictions(self, student: Any, teacher: Any) -> Tensor: ...


def declaration_of(loss: nn.Module) -> Declaration:
    """What a loss says of itself; the one place where a loss that is no `DistillLoss` is asked by name.

    Raises:
        DistillError: It declares a value that means nothing.
    """
    names: dict[str, Any] = {
        key: getattr(loss, key)
        for key in ('consumes', 'needs_target', 'activation', 'any_channels', 'any_grid', 'images')
        if hasattr(loss, key)
    }
    own = getattr(type(loss), 'for_channels', None)
    found = Declaration(
        **names,
        built_per_level=own not in (None, DistillLoss.for_channels),
        takes_predictions=hasattr(loss, 'from_predictions'),
        balances=hasattr(loss, 'counts'),
        stands_for_another=getattr(type(loss), 'for_predictions', None) not in (None, DistillLoss.for_predictions),
    )
    if found.activation not in ACTIVATIONS:
        raise DistillError(
            f"{type(loss).__name__}.activation must be None, 'softmax' or 'sigmoid', got {found.activation!r}."
        )
    if not isinstance(found.images, int) or found.images < 1:
        raise DistillError(f'{type(loss).__name__}.images must be a whole number >= 1, got {found.images!r}.')
    return found
