"""Generalised IoU between the decoded boxes of two dense heads."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import (
    aligned,
    check_choice,
    describe,
    full_precision,
    mean_over_positions,
    reason_for_absence,
)
from kd_plugins.losses._dense import Dense
from kd_plugins.losses.base import DistillLoss

_SMALLEST = 1e-6  # area in square strides below which a box is a line


def box_iou(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""``1 - GIoU`` of the boxes that student and teacher predict at the same position.

    .. math:: \operatorname{mean}_a \left[ 1 - \frac{|S \cap T|}{|S \cup T|} + \frac{|C| - |S \cup T|}{|C|} \right],
              \quad C \text{ the smallest box around both}

    Rezatofighi et al., "Generalized Intersection over Union" (CVPR 2019, arXiv 1902.09630), equation 4, with the
    teacher's box in place of the ground truth. As both boxes are counted from the same point, their distances give
    intersection and enclosing box directly (UnitBox, arXiv 1608.01471). Independent of the boxes' size. Boxes of
    negative width or height have area 0.

    Reduction: mean over positions and images; with ``weight`` the weighted mean over the positions of each image,
    divided by ``max(sum(weight), 1)``, then the mean over images.

    Args:
        student: ``(B, A, 4)`` signed distances from the position's point to left, top, right and bottom, in strides.
        teacher: ``(B, A, 4)`` distances from the same points; no gradient flows into it.
        weight: ``(B, A)`` weight >= 0 of every position, or None for uniform.

    Returns:
        Scalar in [0, 2], in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ.
    """
    student, teacher = aligned(student, teacher, 'Box distances')
    with full_precision(student):
        inner = _area(torch.minimum(student, teacher))
        union = (_area(student) + _area(teacher) - inner).clamp(min=_SMALLEST)
        outer = torch.maximum(_area(torch.maximum(student, teacher)), union)
        return mean_over_positions(1 - inner / union + (outer - union) / outer, weight)


def _area(distances: Tensor) -> Tensor:
    sides = (distances[..., :2] + distances[..., 2:]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


class BoxIoULoss(DistillLoss):
    """Module form of `box_iou`. Consumes two aligned ``DensePredictions`` that both have ``ltrb``.

    Args:
        foreground: Weight positions by ``teacher.confidence()``.
    """

    consumes = 'predictions'

    def __init__(self, foreground: bool = True) -> None:
        super().__init__()
        check_choice((False, True), foreground=foreground)
        self.foreground = foreground

    def forward(self, student: Dense, teacher: Dense) -> Tensor:
        boxes = _decoded(student, 'student'), _decoded(teacher, 'teacher')
        weight = None
        if self.foreground:
            with full_precision(teacher.cls):
                # Before confidence() multiplies: in float16 the product of two small probabilities is 0.
                weight = teacher.float().confidence()
        return box_iou(*boxes, weight)

    def extra_repr(self) -> str:
        return describe(foreground=self.foreground)


def _decoded(predictions: Dense, role: str) -> Tensor:
    if predictions.ltrb is None:
        raise DistillError(
            f"BoxIoULoss needs decoded upright boxes, but the {role}'s head has none"
            f'{reason_for_absence(predictions, "ltrb")}; use BoxL1Loss or YOLOLogitLoss.'
        )
    return predictions.ltrb
