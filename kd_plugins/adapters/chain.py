"""Several adapters as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from kd_plugins.adapters.describe import describe_adapter
from kd_plugins.errors import DistillError


class AdapterChain(nn.Sequential):
    """Adapters one after the other; each sees the teacher's features too.

    Args:
        *adapters: The adapters in order; at least one.

    Attributes:
        needs_image_size: Whether any member is given the image size.

    Raises:
        DistillError: There is none, or one is not a module.
    """

    def __init__(self, *adapters: nn.Module | OrderedDict[str, nn.Module]) -> None:
        if not adapters:
            raise DistillError('An adapter chain needs members; write adapter=[dict(type=...), dict(type=...)].')
        # A slice of a Sequential is built from one ordered dict.
        members = adapters[0].values() if isinstance(adapters[0], OrderedDict) else adapters
        for member in members:
            if not isinstance(member, nn.Module):
                raise DistillError(
                    f'AdapterChain: {member!r} is not an adapter; give modules with forward(student, teacher).'
                )
        super().__init__(*adapters)

    @property
    def needs_image_size(self) -> bool:
        return any(getattr(adapter, 'needs_image_size', False) for adapter in self)

    def forward(self, student: Tensor, teacher: Tensor, image_size: Sequence[int] | None = None) -> Tensor:
        """Apply the members in order.

        Args:
            student: Features of any shape.
            teacher: The teacher's features.
            image_size: ``(H, W)`` of the images in pixels, for the members that need it. Default: not given.

        Returns:
            What the last member makes of it.
        """
        for adapter in self:
            if getattr(adapter, 'needs_image_size', False):
                student = adapter(student, teacher, image_size=image_size)
            else:
                student = adapter(student, teacher)
        return student

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, e.g. ``'conv 1x1 96->256 (24.8k params), resize 10x10->20x20'``."""
        words = []
        for adapter in self:
            words.append(describe_adapter(adapter, student_shape, teacher_shape))
            if getattr(adapter, 'needs_image_size', False):
                # What comes out depends on the image, which a description is not told.
                student_shape = ()
        return ', '.join(word for word in words if word != 'none') or 'none'
