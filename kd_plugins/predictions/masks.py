"""The canonical form of heads that predict a mask per position, as prototypes weighted by coefficients.

A mask is the sum of prototypes weighted by a position's coefficients (Bolya et al., "YOLACT", ICCV 2019, arXiv
1904.02689). Neither can be compared across models: the prototypes of two trainings have nothing to do with each other,
and need not have the same number or size. The masks that they make can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kd_plugins.errors import DistillError
from kd_plugins.losses.base import Declaration
from kd_plugins.predictions.dense import DensePredictions
from kd_plugins.predictions.form import Classes, Form

#: Masks per image that are compared where the loss does not say.
TOPK = 64


@dataclass(frozen=True)
class MaskPredictions(Form):
    """Raw predictions of a detection head with masks, for one batch of images.

    Attributes:
        dense: What the head predicts besides, with ``coefficients (B, A, M)``.
        prototypes: ``(B, M, H, W)``, covering the whole image.

    Raises:
        DistillError: ``dense`` has no coefficients, or not one per prototype.
    """

    name: ClassVar[str] = 'masks'
    head: ClassVar[str] = 'instance segmentation'
    trains_alone: ClassVar[bool] = True
    decoding: ClassVar[tuple[str, ...]] = DensePredictions.decoding

    dense: DensePredictions
    prototypes: Tensor

    def __post_init__(self) -> None:
        found = self.dense.coefficients
        if found is None or self.prototypes.dim() != 4 or found.shape[2] != self.prototypes.shape[1]:
            shape = None if found is None else tuple(found.shape)
            raise DistillError(
                f'Masks need one coefficient per prototype, got coefficients {shape} and prototypes '
                f'{tuple(self.prototypes.shape)}.'
            )

    @property
    def source(self) -> Tensor:
        return self.prototypes

    def tensors(self) -> list[Tensor]:
        return [*self.dense.tensors(), self.dense.require('coefficients'), self.prototypes]

    def detach(self) -> MaskPredictions:
        return MaskPredictions(self.dense.detach(), self.prototypes.detach())

    def image(self, index: int) -> MaskPredictions:
        return MaskPredictions(self.dense.image(index), self.prototypes[index : index + 1])

    def in_full_precision(self) -> MaskPredictions:
        return MaskPredictions(self.dense.float(), _float(self.prototypes))

    def describe(self) -> str:
        return '{} prototypes of {}x{}'.format(*self.prototypes.shape[1:])

    @classmethod
    def align(
        cls, student: MaskPredictions, teacher: MaskPredictions, classes: Classes = None
    ) -> tuple[MaskPredictions, MaskPredictions]:
        ours, theirs = DensePredictions.align(student.dense, teacher.dense, classes)
        return MaskPredictions(ours, student.prototypes), MaskPredictions(theirs, teacher.prototypes)

    @classmethod
    def compare(
        cls,
        loss: nn.Module,
        declared: Declaration,
        student: MaskPredictions,
        teacher: MaskPredictions,
        target: Tensor | None = None,
        classes: Classes = None,
    ) -> Tensor:
        pair = pair_masks(student, teacher, getattr(loss, 'topk', TOPK))
        return loss(pair.student, pair.teacher, pair.inside, pair.weight)


@dataclass(frozen=True)
class MaskPair:
    """Mask logits of student and teacher for the same ``K`` positions of every image.

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


def pair_masks(student: MaskPredictions, teacher: MaskPredictions, topk: int = TOPK) -> MaskPair:
    """Assemble the masks of the positions that the teacher is most confident about.

    A fixed number per image, whatever is in it: the shapes do not depend on the data, and the memory, ``B * topk``
    masks of the student's prototype size, is about what a task loss assembles for the labelled objects. Positions that
    the teacher sees nothing at weigh nothing.

    Args:
        student: Aligned predictions of the student.
        teacher: Aligned predictions of the teacher.
        topk: Positions per image.

    Returns:
        The masks at the student's prototype resolution.

    Raises:
        DistillError: The teacher's boxes are not upright.
    """
    mine, other = _float(student.prototypes), _float(teacher.prototypes.detach())
    dense = teacher.dense
    confidence = dense.confidence()
    weight, best = confidence.topk(min(topk, confidence.shape[1]), 1)
    height, width = mine.shape[-2:]
    if other.shape[-2:] != mine.shape[-2:]:
        # Assembling is linear: resizing the prototypes resizes the masks, and there are fewer of them.
        other = interpolate(other, (height, width), mode='bilinear', align_corners=False)
    boxes = dense.boxes().gather(1, best[..., None].expand(-1, -1, 4))
    (rows, columns), stride = dense.level_sizes[0], dense.strides[0]
    return MaskPair(
        student=assemble(_chosen(student.dense, best), mine),
        teacher=assemble(_chosen(dense, best).detach(), other),
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


def _chosen(dense: DensePredictions, best: Tensor) -> Tensor:
    """``(B, K, M)`` coefficients of some positions."""
    flat = _float(dense.require('coefficients'))
    return flat.gather(1, best[..., None].expand(-1, -1, flat.shape[2]))


def _float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
