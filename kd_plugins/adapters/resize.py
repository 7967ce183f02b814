"""Resampling to the teacher's grid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from kd_plugins.adapters.base import Adapter
from kd_plugins.errors import DistillError


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """Resample a map to another grid.

    Bilinear with half-pixel centres. Where a side shrinks by more than 2, it is first resampled to the multiple of its
    new length next below, then averaged. Bilinear interpolation alone reads two neighbours per side whatever the
    factor: from 64x64 to 8x8 cells it would see 4 positions of every 64, alias what repeats faster than the small grid
    can show, and give the other 60 no gradient. At the factor 2 both are the same mean, so nothing jumps there.
    (Torch's own ``antialias`` fails at large factors on CUDA, pytorch issue 103589; adaptive pooling has no
    deterministic gradient there.)

    Args:
        features: ``(B, C, H, W)``.
        size: ``(H', W')``.

    Returns:
        ``(B, C, H', W')``; ``features`` itself when the grid is that one. Each value is a weighted mean of its
        neighbourhood, so a constant stays what it is.
    """
    size, old = tuple(size), features.shape[-2:]
    # Each side on its own: one may shrink while the other grows.
    factors = tuple(max(now // to, 1) for now, to in zip(old, size, strict=True))
    between = tuple(factor * to for factor, to in zip(factors, size, strict=True))
    if old != between:
        features = interpolate(features, size=between, mode='bilinear', align_corners=False)
    return features if factors == (1, 1) else avg_pool2d(features, factors)


class ResizeAdapter(Adapter):
    """Resampling of the student's map to the teacher's grid (see `resize`); no parameters.

    The grid is the teacher's at every call, because multi-scale training changes the input size.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Resample.

        Args:
            student: ``(B, C, H, W)``.
            teacher: ``(B, C', H', W')``; only its grid is used.

        Returns:
            ``(B, C, H', W')``; ``student`` itself when the grids are equal.

        Raises:
            DistillError: One of the two is not a map.
        """
        for role, tensor, advice in (
            ('student', student, "put dict(type='TokensToMap') before it"),
            ('teacher', teacher, "write dict(type='MapToTokens') in its place"),
        ):
            if tensor.dim() != 4:
                # The last two dimensions of tokens would pass for a grid.
                raise DistillError(
                    f'ResizeAdapter: the {role} is {tuple(tensor.shape)}, not a (B, C, H, W) map; if those are '
                    f'tokens, {advice}.'
                )
        return resize(student, teacher.shape[-2:])

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, e.g. ``'resize 10x10->20x20'``, ``'resize to 20x20'`` where the student's grid is not known.

        ``'none'`` where the grids are equal.
        """
        height, width = teacher_shape[-2:]
        if tuple(student_shape[2:]) == (height, width):
            return 'none'
        if len(student_shape) != 4:
            return f'resize to {height}x{width}'
        return f'resize {student_shape[-2]}x{student_shape[-1]}->{height}x{width}'
