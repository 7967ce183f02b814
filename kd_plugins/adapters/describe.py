"""An adapter in words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kd_plugins.adapters._common import count


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
    if adapter is None:
        return 'none'
    if hasattr(adapter, 'describe'):
        return adapter.describe(student_shape, teacher_shape)
    return f'{type(adapter).__name__} ({count(adapter)} params)'
