"""The adapter that a pair of shapes needs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kd_plugins.adapters._common import check_switches
from kd_plugins.adapters.chain import AdapterChain
from kd_plugins.adapters.conv import ConvAdapter
from kd_plugins.adapters.linear import LinearAdapter
from kd_plugins.adapters.resize import ResizeAdapter
from kd_plugins.errors import DistillError

_KINDS = {2: '(B, C) vector', 3: '(B, N, C) token sequence', 4: '(B, C, H, W) map'}


def auto_adapter(
    student_shape: Sequence[int],
    teacher_shape: Sequence[int],
    *,
    norm: bool = False,
    channels: bool = True,
) -> nn.Module | None:
    """Build the adapter that brings the student's features to the teacher's shape.

    Args:
        student_shape: ``(B, C, H, W)`` of the student's map, ``(B, N, C)`` of its tokens, ``(B, C)`` of its vectors.
        teacher_shape: The same of the teacher: ``(B, C', H', W')``, ``(B, N, C')``, ``(B, C')``.
        norm: A `ConvAdapter` gets a BatchNorm2d. Default: False.
        channels: Bring the channels together; False leaves them, for losses that compare no channels. Default: True.

    Returns:
        For maps a `ResizeAdapter`, and a chain with a `ConvAdapter` when the channels differ; for tokens and vectors
        a `LinearAdapter` when they do, else None. The caller puts it on a device.

        Maps that have one grid here may have two in another batch: of a side of 73 pixels a ResNet makes 19 cells and
        a patch embedding 18. A `ResizeAdapter` returns the student itself while the grids are equal.

        A chain convolves on the smaller grid. Without a norm the order does not change the result, as the 1x1
        convolution acts on channels and resampling takes weighted means of positions. With one it does in training:
        the statistics are those of the map that the convolution sees.

    Raises:
        DistillError: Shapes of different kinds, batch sizes or token counts, or an option that has no effect here.
    """
    student_shape, teacher_shape = tuple(student_shape), tuple(teacher_shape)
    check_switches('auto adapter', norm=norm, channels=channels)
    if norm and not channels:
        raise DistillError(
            'auto adapter: norm=True goes with the convolution that channels=False leaves out; remove one of them.'
        )
    if student_shape == teacher_shape and len(student_shape) != 4:
        return None
    between = f'between student {student_shape} and teacher {teacher_shape}'
    if len(student_shape) != len(teacher_shape) or len(student_shape) not in _KINDS:
        raise DistillError(
            f'No automatic adapter {between}: the student is a {_kind(student_shape)}, the teacher a '
            f'{_kind(teacher_shape)}; tap modules of one kind, or name an adapter of your own.'
        )
    if student_shape[0] != teacher_shape[0]:
        raise DistillError(
            f'Student {student_shape} and teacher {teacher_shape} differ in the batch size; tap modules that see '
            'whole images, not regions.'
        )
    if len(student_shape) == 4:
        return _between_maps(student_shape, teacher_shape, norm, channels)
    if student_shape[1:-1] != teacher_shape[1:-1]:
        raise DistillError(
            f'No automatic adapter {between}: the token counts differ; bring both to maps with as_map first, or tap '
            'modules with equal counts.'
        )
    if not channels:
        return None
    if norm:
        raise DistillError(
            f'auto adapter: norm=True is for maps, not for a {_kind(student_shape)} {student_shape}; remove it.'
        )
    return LinearAdapter(student_shape[-1], teacher_shape[-1])


def _between_maps(student: tuple[int, ...], teacher: tuple[int, ...], norm: bool, channels: bool) -> nn.Module:
    resize = ResizeAdapter()
    if not channels or student[1] == teacher[1]:
        return resize
    conv = ConvAdapter(student[1], teacher[1], norm)
    shrinks = student[2] * student[3] > teacher[2] * teacher[3]
    return AdapterChain(resize, conv) if shrinks else AdapterChain(conv, resize)


def _kind(shape: tuple[int, ...]) -> str:
    return _KINDS.get(len(shape), f'{len(shape)}-d tensor')
