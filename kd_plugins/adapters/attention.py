"""Where in the image a transformer's attention goes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kd_plugins.adapters.tokens import find_grid
from kd_plugins.errors import DistillError

# Published transformers have four registers where these come without a class token.
_REGISTERS_ALONE = 4


def attention_map(probabilities: Tensor, image_size: Sequence[int], prefix_tokens: int | None = None) -> Tensor:
    """Attention probabilities as a map over the image, one channel per head.

    With a class token: what it attends to (class attention). Without one: what the patches attend to, on average.
    The patches are taken as they are; what went to tokens in front of them is left out, so that a map sums to less
    than 1. Losses that normalise the map, as `AttentionTransferLoss` does, are not affected.

    Args:
        probabilities: ``(B, heads, Q, N)``: for each of Q queries how it attends to N tokens, in row-major order behind
            those that belong to no patch. Q is N, or 1 where the class token alone asks (CaiT), or any number where the
            patches attend to a coarser grid of themselves (PVT).
        image_size: ``(H, W)`` in pixels of the image that the model was given.
        prefix_tokens: Tokens in front of the patches. The first is taken for a class token unless there are four, as
            registers are where they come alone. Default: see `find_grid`.

    Returns:
        ``(B, heads, h, w)``.

    Raises:
        DistillError: The tensor has other dimensions, or no grid is found.
    """
    if probabilities.dim() != 4:
        raise DistillError(
            f'attention_map takes (B, heads, queries, tokens) probabilities, got {tuple(probabilities.shape)}; '
            'attention within windows is of no use here: tap the attention of a ViT, or features.'
        )
    queries, tokens = probabilities.shape[2:]
    height, width, prefix = find_grid(tokens, image_size, prefix_tokens)
    if queries == tokens:
        by_class = prefix not in (0, _REGISTERS_ALONE)
        attention = probabilities[:, :, 0] if by_class else probabilities[:, :, prefix:].mean(2)
    else:
        attention = probabilities.mean(2)
    return attention[..., prefix:].unflatten(2, (height, width))
