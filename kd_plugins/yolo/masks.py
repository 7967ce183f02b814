"""The masks that two segment heads predict at the same anchors, assembled so that they can be compared.

A mask is the sum of prototypes weighted by an anchor's coefficients. Neither can be compared across models: the
prototypes of two trainings have nothing to do with each other, and need not have the same number or size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kd_plugins.errors import DistillError
from kd_plugins.predictions import DensePredictions


@dataclass(frozen=True)
class MaskPair:
    """Mask logits of student and teacher for the same ``K`` anchors of every image.

    Attributes:
        student: ``(B, K, H, W)`` logits.
        teacher: ``(B, K, H, W)`` logits, detached.
        inside: ``(B, K, H, W)`` bool, the pixels in the teacher's box.
        weight: ``(B, K)`` the teacher's confidence.
    """

    student: Tensor
    teacher: Tensor
    inside: Tensor
    weight: Tensor


def prototypes(raw: Mapping[str, Any]) -> Tensor:
    """``(B, M, H, W)`` prototypes in raw predictions; YOLO26 returns ``(prototypes, semantic logits)`` in training.

    Raises:
        DistillError: The head has none.
    """
    found = raw.get('proto')
    found = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(found, Tensor) or 'mask_coefficient' not in raw:
        raise DistillError('The head returned no mask coefficients and prototypes.')
    return found


def pair_masks(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    our_strides: Sequence[float],
    their_strides: Sequence[float],
    teacher: DensePredictions,
    topk: int,
) -> MaskPair:
    """Assemble the masks of the anchors that the teacher is most confident about.

    A fixed number per image, whatever is in it: the shapes do not depend on the data, and the memory, ``B * topk``
    masks of the student's prototype size, is about what the task loss assembles for the labelled objects. Anchors that
    the teacher sees nothing at weigh nothing.

    Args:
        ours: Raw predictions of the student with ``mask_coefficient (B, M, A)`` and ``proto (B, M, H, W)``.
        theirs: Raw predictions of the teacher.
        our_strides: Strides of the student's levels in the order of its anchors.
        their_strides: Strides of the teacher's levels.
        teacher: The teacher's aligned predictions.
        topk: Anchors per image.

    Returns:
        The masks at the student's prototype resolution.

    Raises:
        DistillError: A head has no masks, or boxes are not upright.
    """
    mine, other = prototypes(ours).float(), prototypes(theirs).detach().float()
    confidence = teacher.confidence()
    weight, best = confidence.topk(min(topk, confidence.shape[1]), 1)
    height, width = mine.shape[-2:]
    if other.shape[-2:] != mine.shape[-2:]:
        # Assembling is linear: resizing the prototypes resizes the masks, and there are fewer of them.
        other = interpolate(other, (height, width), mode='bilinear', align_corners=False)
    boxes = teacher.boxes().gather(1, best[..., None].expand(-1, -1, 4))
    (rows, columns), stride = teacher.level_sizes[0], teacher.strides[0]
    return MaskPair(
        student=assemble(_coefficients(ours, our_strides, teacher.strides, best), mine),
        teacher=assemble(_coefficients(theirs, their_strides, teacher.strides, best).detach(), other),
        inside=inside_boxes(boxes, (height, width), (rows * stride / height, columns * stride / width)),
        weight=weight,
    )


def assemble(coefficients: Tensor, prototypes: Tensor) -> Tensor:
    """``(B, K, H, W)`` mask logits from ``(B, K, M)`` coefficients and ``(B, M, H, W)`` prototypes."""
    return torch.bmm(coefficients, prototypes.flatten(2)).unflatten(2, prototypes.shape[2:])


def inside_boxes(boxes: Tensor, size: tuple[int, int], scale: tuple[float, float]) -> Tensor:
    """``(B, K, H, W)`` bool: which pixels have their centre in the box.

    Args:
        boxes: ``(B, K, 4)`` boxes ``(x1, y1, x2, y2)`` in pixels of the network input.
        size: ``(H, W)`` of the masks.
        scale: Pixels of the network input per mask pixel, vertically and horizontally.
    """
    y = (torch.arange(size[0], device=boxes.device, dtype=boxes.dtype) + 0.5) * scale[0]
    x = (torch.arange(size[1], device=boxes.device, dtype=boxes.dtype) + 0.5) * scale[1]
    x1, y1, x2, y2 = (b[..., None] for b in boxes.unbind(-1))
    return ((y >= y1) & (y < y2))[..., :, None] & ((x >= x1) & (x < x2))[..., None, :]


def _coefficients(raw: Mapping[str, Any], strides: Sequence[float], common: Sequence[float], best: Tensor) -> Tensor:
    """``(B, K, M)`` coefficients of some aligned anchors."""
    lengths = [f.shape[-2] * f.shape[-1] for f in raw['feats']]
    pieces = dict(zip(map(float, strides), raw['mask_coefficient'].float().split(lengths, 2), strict=True))
    flat = torch.cat([pieces[s] for s in common], 2).transpose(1, 2)
    return flat.gather(1, best[..., None].expand(-1, -1, flat.shape[2]))
