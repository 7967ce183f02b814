"""Token sequences and maps: which grid a sequence has, and the way from one to the other.

A transformer's features are ``(B, N, C)`` tokens, a convolutional network's ``(B, C, H, W)`` maps. Where a token sits
in the image is nowhere in the tensor: it follows from the image size and the patch size, and some tokens in front
(class, distillation, registers) sit nowhere. `find_grid` works that out at every call, because multi-scale training
changes the image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kd_plugins.adapters._common import check_integers
from kd_plugins.adapters.base import Adapter
from kd_plugins.adapters.resize import resize
from kd_plugins.errors import DistillError

# None; class; class and distillation; four registers, with and without the class.
MAX_PREFIX_TOKENS = 5
# Strides of networks and patch sizes of published transformers. Images are padded or cropped to these.
_USUAL_PATCHES = frozenset({1, 2, 4, 8, 14, 16, 32, 64, 128})


def find_grid(count: int, image_size: Sequence[int], prefix_tokens: int | None = None) -> tuple[int, int, int]:
    """Which patch grid a token sequence has.

    Each side has as many patches as fit (patch embeddings without padding) or one more for the rest (with padding).
    Tried are the usual patch sizes, powers of two to 128 and 14, and every other that divides both sides: with any size
    and any rounding, every second number of tokens would be some grid of an 800x1333 image, 300 queries too. Of the
    grids that leave 0 to 5 tokens over, the best is one of a usual patch size, then of one that divides both sides (so
    9 tokens of an 80x80 image are 3x3 patches of 32, not 2x2 of 40 behind 5 others), then of one that rounds both
    sides the same way, then the one with the fewest tokens in front.

    Args:
        count: Tokens of the sequence, those in front included.
        image_size: ``(H, W)`` in pixels of the image that the model was given.
        prefix_tokens: Class, distillation and register tokens in front of the patches. Default: found as above.

    Returns:
        ``(height, width, prefix)`` with ``height * width + prefix == count``.

    Raises:
        DistillError: No grid fits, two are equally good, or a value is not what it should be.
    """
    height, width = _check_image_size(image_size)
    if prefix_tokens is not None:
        check_integers('find_grid', 0, prefix_tokens=prefix_tokens)
    allowed = range(MAX_PREFIX_TOKENS + 1) if prefix_tokens is None else (prefix_tokens,)
    grids = _grids(height, width)
    fitting = [
        ((*rank, prefix), grid) for grid, rank in grids.items() if (prefix := count - grid[0] * grid[1]) in allowed
    ]
    if not fitting:
        raise DistillError(_nothing_fits(count, (height, width), prefix_tokens, grids))
    best = min(rank for rank, _ in fitting)
    winners = [grid for rank, grid in fitting if rank == best]
    if len(winners) > 1:
        shown = ' or '.join(f'{h}x{w}' for h, w in sorted(winners))
        raise DistillError(
            f'{count} tokens of a {height}x{width} image may be a grid of {shown} behind {best[-1]} other tokens; '
            f"write adapter=dict(type='TokensToMap', grid={sorted(winners)[0]}), or prefix_tokens=... if there are "
            f'not {best[-1]} class, distillation and register tokens.'
        )
    return (*winners[0], best[-1])


@lru_cache(maxsize=256)
def _grids(height: int, width: int) -> dict[tuple[int, int], tuple[bool, int]]:
    """The patch grids an image may have, with how far-fetched each is: ``(unusual patch size, rounding)``."""
    found: dict[tuple[int, int], tuple[bool, int]] = {}
    for patch in range(1, max(height, width, *_USUAL_PATCHES) + 1):
        exact = height % patch == 0 and width % patch == 0
        if not exact and patch not in _USUAL_PATCHES:
            continue
        for i, rows in enumerate((height // patch, -(-height // patch))):
            for j, columns in enumerate((width // patch, -(-width // patch))):
                if rows and columns:
                    # Swin may round down at its patch embedding and up at each merging: the sides come out unlike.
                    rank = (patch not in _USUAL_PATCHES, 0 if exact else 1 if i == j else 2)
                    found[rows, columns] = min(found.get((rows, columns), rank), rank)
    return found


def _nothing_fits(
    count: int,
    image_size: tuple[int, int],
    prefix_tokens: int | None,
    grids: dict[tuple[int, int], tuple[bool, int]],
) -> str:
    given = f'0 to {MAX_PREFIX_TOKENS}' if prefix_tokens is None else str(prefix_tokens)
    message = (
        f'{count} tokens are no patch grid of a {image_size[0]}x{image_size[1]} image behind {given} class, '
        'distillation and register tokens; '
    )
    others = sorted({count - h * w for (h, w), rank in grids.items() if rank <= (False, 1)} & set(range(17)))
    if others:
        return message + f'write prefix_tokens={others[0]} if there are that many, as a grid would need.'
    return message + 'tap a module whose tokens are all the patches of the image, or write prefix_tokens=... .'


def _check_image_size(image_size: Sequence[int]) -> tuple[int, int]:
    size = tuple(image_size) if isinstance(image_size, Sequence) else ()
    if len(size) != 2 or not all(isinstance(v, int) and v >= 1 for v in size):
        raise DistillError(f'image_size must be (H, W) in pixels, got {image_size!r}.')
    return size


def as_map(tensor: Tensor, image_size: Sequence[int], prefix_tokens: int | None = None) -> Tensor:
    """Features of an image as a map.

    Args:
        tensor: ``(B, C, H, W)`` map, ``(B, N, C)`` tokens in row-major order behind those that belong to no patch, or
            ``(B, H, W, C)`` channels-last map, as timm's Swin has. The latter is recognised by dimensions 1 and 2 being
            a grid of the image for some stride while 2 and 3 are not; if both could be, it is ``(B, C, H, W)``.
        image_size: ``(H, W)`` in pixels of the image that the model was given.
        prefix_tokens: Tokens in front of the patches, which a map has no place for. Default: see `find_grid`.

    Returns:
        ``(B, C, H, W)``: ``tensor`` itself if it is one, otherwise a view.

    Raises:
        DistillError: The tensor has other dimensions, or no grid is found.
    """
    if tensor.dim() == 4:
        grids = _grids(*_check_image_size(image_size))
        if tuple(tensor.shape[2:]) not in grids and tuple(tensor.shape[1:3]) in grids:
            return tensor.permute(0, 3, 1, 2)
        return tensor
    if tensor.dim() != 3:
        raise DistillError(
            f'as_map: {tuple(tensor.shape)} is neither a (B, C, H, W) map nor (B, N, C) tokens; {_advice(tensor)}.'
        )
    return _unroll(tensor, *find_grid(tensor.shape[1], image_size, prefix_tokens))


def as_tokens(features: Tensor) -> Tensor:
    """A map as tokens, row by row.

    Args:
        features: ``(B, C, H, W)`` map, or ``(B, N, C)`` tokens.

    Returns:
        ``(B, H * W, C)``: a view, or ``features`` itself if they are tokens.

    Raises:
        DistillError: The tensor has other dimensions.
    """
    if features.dim() == 3:
        return features
    if features.dim() != 4:
        raise DistillError(f'as_tokens: {tuple(features.shape)} is no (B, C, H, W) map; {_advice(features)}.')
    return features.flatten(2).transpose(1, 2)


def _unroll(tokens: Tensor, height: int, width: int, prefix: int) -> Tensor:
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (height, width))


def _advice(tensor: Tensor) -> str:
    if tensor.dim() == 2:
        return 'a (B, C) vector has no positions: tap a module before the pooling, or a vector on both sides'
    return 'tap another module'


class _Grid(Adapter):
    """What the two modules share: how the grid of a token sequence is known."""

    needs_image_size = True

    def __init__(self, prefix_tokens: int | None = None, grid: Sequence[int] | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if prefix_tokens is not None:
            check_integers(name, 0, prefix_tokens=prefix_tokens)
        if grid is not None:
            if not isinstance(grid, Sequence) or isinstance(grid, str) or len(grid) != 2:
                raise DistillError(f'{name}: grid must be (height, width) in tokens, got {grid!r}.')
            check_integers(name, 1, **{'grid[0]': grid[0], 'grid[1]': grid[1]})
        self.prefix_tokens = prefix_tokens
        self.grid = None if grid is None else tuple(grid)

    def _find(self, count: int, image_size: Sequence[int] | None) -> tuple[int, int, int]:
        if self.grid is None:
            return find_grid(count, self._given(image_size), self.prefix_tokens)
        height, width = self.grid
        prefix = count - height * width
        if prefix < 0 or self.prefix_tokens not in (None, prefix):
            front = 'any number of' if self.prefix_tokens is None else self.prefix_tokens
            raise DistillError(
                f'{type(self).__name__}: {count} tokens are not grid={self.grid} behind {front} class, distillation '
                'and register tokens; correct it, or leave grid out where the image size changes.'
            )
        return height, width, prefix

    def _given(self, image_size: Sequence[int] | None) -> Sequence[int]:
        if image_size is None:
            raise DistillError(
                f'{type(self).__name__} needs image_size=(H, W), or option grid=(height, width) in tokens.'
            )
        return image_size


class TokensToMap(_Grid):
    """The student's tokens, or channels-last map, as a map (see `as_map`); no parameters.

    Args:
        prefix_tokens: Class, distillation and register tokens in front of the patches. Default: see `find_grid`.
        grid: ``(height, width)`` of the student's patch grid, where the image size does not tell it (overlapping
            patches, say) and stays the same. Default: found at every call.

    Attributes:
        needs_image_size: True: whoever calls it passes ``image_size``.

    Raises:
        DistillError: An option is not what it should be.
    """

    def forward(self, student: Tensor, teacher: Tensor, image_size: Sequence[int] | None = None) -> Tensor:
        """Lay the tokens out.

        Args:
            student: ``(B, N, C)`` tokens, or what else `as_map` takes.
            teacher: Not used.
            image_size: ``(H, W)`` of the images in pixels. Default: not given, then ``grid`` must be.

        Returns:
            ``(B, C, H, W)``.

        Raises:
            DistillError: The grid cannot be found, or is not the one given.
        """
        if student.dim() == 3:
            return _unroll(student, *self._find(student.shape[1], image_size))
        if self.grid is None:
            return as_map(student, self._given(image_size), self.prefix_tokens)
        if tuple(student.shape[2:]) == self.grid:
            return student
        if student.dim() == 4 and tuple(student.shape[1:3]) == self.grid:
            return student.permute(0, 3, 1, 2)
        raise DistillError(
            f'TokensToMap: {tuple(student.shape)} has no grid={self.grid}; correct it, or leave grid out where the '
            'image size changes.'
        )

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, e.g. ``'to map'`` or ``'to map 14x14'``."""
        return 'to map' if self.grid is None else f'to map {self.grid[0]}x{self.grid[1]}'


class MapToTokens(_Grid):
    """The student's map as tokens of the teacher's grid; no parameters.

    For losses on tokens. The map is resampled to the teacher's grid if need be. The teacher's tokens in front of the
    patches have nothing to be compared with in a map: their places take the teacher's own values, so that they add
    no difference and no gradient. Channels are not changed: put a `ConvAdapter` before it, or a `LinearAdapter`
    behind it where there are no tokens in front.

    Args:
        prefix_tokens: The *teacher's* class, distillation and register tokens. Default: see `find_grid`.
        grid: ``(height, width)`` of the teacher's patch grid, as in `TokensToMap`. Default: found at every call.

    Attributes:
        needs_image_size: True: whoever calls it passes ``image_size``.

    Raises:
        DistillError: An option is not what it should be.
    """

    def forward(self, student: Tensor, teacher: Tensor, image_size: Sequence[int] | None = None) -> Tensor:
        """Resample and line up.

        Args:
            student: ``(B, C, H, W)`` map.
            teacher: ``(B, N, C')`` tokens.
            image_size: ``(H, W)`` of the images in pixels. Default: not given, then ``grid`` must be.

        Returns:
            ``(B, N, C)``.

        Raises:
            DistillError: The student is no map or the teacher no tokens, the teacher's grid cannot be found, or it has
                tokens in front and other channels.
        """
        if student.dim() != 4 or teacher.dim() != 3:
            raise DistillError(
                'MapToTokens takes a (B, C, H, W) map of the student and (B, N, C) tokens of the teacher, got '
                f'{tuple(student.shape)} and {tuple(teacher.shape)}; remove it if both are tokens.'
            )
        height, width, prefix = self._find(teacher.shape[1], image_size)
        tokens = as_tokens(resize(student, (height, width)))
        if not prefix:
            return tokens
        if tokens.shape[2] != teacher.shape[2]:
            raise DistillError(
                f'MapToTokens: the student has {tokens.shape[2]} channels, the teacher {teacher.shape[2]}; put '
                f"dict(type='ConvAdapter', in_channels={tokens.shape[2]}, out_channels={teacher.shape[2]}) before it."
            )
        return torch.cat([teacher[:, :prefix].detach().to(tokens.dtype), tokens], dim=1)

    def describe(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
        """In words, e.g. ``'to 197 tokens'``."""
        return f'to {teacher_shape[1]} tokens'
