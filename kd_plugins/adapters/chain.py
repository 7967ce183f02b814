"""Several adapters as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from kd_plugins.adapters.base import Adapter, adapt, describe_adapter, traits_of
from kd_plugins.errors import DistillError


class AdapterChain(Adapter, nn.Sequential):
    """Adapters one after the other; each sees the teacher's features too.

    Args:
        *adapters: The adapters in order; at least one.

    Attributes:
        needs_image_size: Whether any member is given the image size.

    Raises:
        DistillError: There is none, or one is not a module.
    """

    def __init__(self, *adapters: nn.Module | OrderedDict[str, nn.Module]) -> None:
        members: OrderedDict[str, nn.Module] = OrderedDict()
        for index, member in enumerate(adapters):
            if isinstance(member, OrderedDict):
                # A slice of a Sequential is built from one ordered dict.
                members.update(member)
            elif isinstance(member, nn.Module):
                members[str(index)] = member
            else:
                raise DistillError(
                    f'AdapterChain: {member!r} is not an adapter; give modules with forward(student, teacher).'
                )
        if not members:
            raise DistillError('An adapter chain needs members; write adapter=[dict(type=...), dict(type=...)].')
        super().__init__(members)
        self.needs_image_size = any(traits_of(adapter).needs_image_size for adapter in self)

    # A Sequential's forward has one argument; only its container is wanted here.
    def forward(  # type: ignore[override]
        self, student: Tensor, teacher: Tensor, image_size: Sequence[int] | None = None
    ) -> Tensor:
        """Apply the members in order.

        Args:
            student: Features of any shape.
            teacher: The teacher's features.
            image_size: ``(H, W)`` of the images in pixels, for the members that need it. Default: not given.

        Returns:
            What the last member makes of it.
        """
        for adapter in self:
            student = adapt(adapter, student, teacher, image_size)
        return student

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, e.g. ``'conv 1x1 96->256 (24.8k params), resize 10x10->20x20'``."""
        words = []
        for adapter in self:
            words.append(describe_adapter(adapter, student_shape, teacher_shape))
            if traits_of(adapter).needs_image_size:
                # What comes out depends on the image, which a description is not told.
                student_shape = ()
        return ', '.join(word for word in words if word != 'none') or 'none'
