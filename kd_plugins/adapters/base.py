"""What an adapter says of itself, and how one is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kd_plugins.adapters._common import count


class Adapter(nn.Module):
    """Base of all adapters here; ``forward(student, teacher)`` returns the adapted student.

    An adapter of one's own may inherit from it or not: see `traits_of`.

    Attributes:
        needs_image_size: Whether ``forward`` also takes ``image_size=(H, W)``, the size of the images in pixels.
    """

    needs_image_size: bool = False

    def for_shapes(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module:
        """The adapter for features of these shapes, which are known in the dry run: itself, unless it is built then."""
        return self

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, for the summary table; ``student_shape`` is empty where it is not known (inside a chain)."""
        return _name_and_size(self)


@dataclass(frozen=True)
class Traits:
    """What an adapter says of itself, see `Adapter`."""

    needs_image_size: bool
    for_shapes: Callable[[Sequence[int], Sequence[int]], nn.Module]
    describe: Callable[[Sequence[int], Sequence[int]], str]


def traits_of(adapter: nn.Module) -> Traits:
    """What an adapter says of itself; the one place where a module that is no `Adapter` is asked by name.

    Any module with ``forward(student, teacher)`` is an adapter. What it does not say is as in `Adapter`.
    """
    return Traits(
        needs_image_size=getattr(adapter, 'needs_image_size', False),
        for_shapes=getattr(adapter, 'for_shapes', lambda student_shape, teacher_shape: adapter),
        describe=getattr(adapter, 'describe', lambda student_shape, teacher_shape: _name_and_size(adapter)),
    )


def adapt(adapter: nn.Module, student: Tensor, teacher: Tensor, image_size: Sequence[int] | None = None) -> Tensor:
    """Call an adapter.

    Args:
        adapter: One of ours, or any module with ``forward(student, teacher)``.
        student: Features of any shape.
        teacher: The teacher's features.
        image_size: ``(H, W)`` of the images in pixels, passed on if the adapter needs it. Default: not known.

    Returns:
        The adapted student.
    """
    if traits_of(adapter).needs_image_size:
        return adapter(student, teacher, image_size=image_size)
    return adapter(student, teacher)


def describe_adapter(adapter: nn.Module | None, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
    """An adapter in words, for the summary table.

    Args:
        adapter: None, one of ours, or any module; a module may have
            ``describe(student_shape, teacher_shape) -> str``.
        student_shape: Shape of the features that go in; empty where it is not known (inside a chain, behind an
            adapter whose output depends on the image).
        teacher_shape: Shape of the teacher's features.

    Returns:
        E.g. ``'none'``, ``'conv 1x1 96->256 (24.8k params)'``, ``'MyAdapter (1.2M params)'``.
    """
    return 'none' if adapter is None else traits_of(adapter).describe(student_shape, teacher_shape)


def _name_and_size(module: nn.Module) -> str:
    return f'{type(module).__name__} ({count(module)} params)'
