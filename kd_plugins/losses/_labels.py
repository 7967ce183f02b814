"""Labels as a loss receives them: class indices, or the soft labels of mixed images."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugins.errors import DistillError


def class_shares(target: Tensor, logits: Tensor) -> Tensor | None:
    """Which classes every image was mixed from, or None when ``target`` holds class indices.

    Mixup and CutMix label an image with the shares of its classes. Label smoothing adds the same value to all classes;
    that floor, the smallest value of an image, says nothing about it and is taken off. Not so with two classes, where
    nothing tells a floor from a share, nor from labels that are equal for all classes.

    Args:
        target: ``(...)`` int class indices, or ``(..., C)`` floating point soft labels that sum to 1.
        logits: ``(..., C)``; gives shape and dtype.

    Returns:
        ``(..., C)`` values >= 0 that sum to 1, in the dtype of ``logits``.

    Raises:
        DistillError: ``target`` is neither.
    """
    if target.is_floating_point() and target.shape == logits.shape:
        return _without_floor(target.to(logits.dtype))
    if target.is_floating_point() or target.shape != logits.shape[:-1]:
        raise DistillError(
            f'target must hold one class index per position, {tuple(logits.shape[:-1])}, or soft labels, '
            f'{tuple(logits.shape)}, got {tuple(target.shape)} of {target.dtype}.'
        )
    return None


def _without_floor(shares: Tensor) -> Tensor:
    total = shares.sum(-1, keepdim=True)
    # Labels in bfloat16 are off by up to 1/256.
    right = ((total - 1).abs() <= 0.01) & (shares >= 0).all(-1, keepdim=True)
    if not right.all():
        wrong = shares[~right[..., 0]][0]
        raise DistillError(
            f'Soft labels must be >= 0 and sum to 1 over the classes, got a sum of {wrong.sum():.6g} and a smallest '
            f'value of {wrong.min():.6g}; for classes that do not exclude each other use BinaryKLDivLoss.'
        )
    if shares.shape[-1] > 2:
        above = shares - shares.amin(-1, keepdim=True)
        shares = torch.where(above.any(-1, keepdim=True), above, shares)
    return shares / shares.sum(-1, keepdim=True)
