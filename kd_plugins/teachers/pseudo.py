"""Pseudo-labels: what a teacher detects is added to the labels of a batch that does not have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_plugins.errors import DistillError, check_keys
from kd_plugins.predictions import Classes, DensePredictions

_KEYS = ('score', 'iou', 'nms')


@dataclass(frozen=True)
class PseudoLabels:
    """Which detections of a teacher become labels of the student.

    A detector is taught that whatever has no label is background. Where new data is labelled for new classes only, that
    un-teaches the old ones: their objects are in the images, without labels. The detections of the old model stand in
    for these labels (as in CL-DETR, arXiv 2304.03110, section 3.1; distillation from the old model: arXiv 1708.06977).

    Attributes:
        score: Lowest score (class probability, times objectness where the head has one) of a detection. Default: 0.4.
        iou: Detections that overlap a label of any class by more are left out: the object has its label.
            Default: 0.7.
        nms: Overlap above which the less certain of two detections of one class is dropped. Default: 0.65.
    """

    score: float = 0.4
    iou: float = 0.7
    nms: float = 0.65

    @classmethod
    def read(cls, value: Any, where: str = 'pseudo_labels') -> PseudoLabels | None:
        """From a config: None or False for none, True, the score, or a mapping of the attributes.

        Raises:
            DistillError: A key is unknown, or a value is not in (0, 1).
        """
        if value is None or value is False:
            return None
        options = {} if value is True else dict(value) if isinstance(value, Mapping) else {'score': value}
        check_keys(options, _KEYS, where)
        for key, number in options.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < 1:
                raise DistillError(f'{where}.{key} must be a number between 0 and 1, got {number!r}.')
        return cls(**options)

    def to_dict(self) -> dict[str, float]:
        """The attributes, such that ``read`` of it is equal."""
        return {key: getattr(self, key) for key in _KEYS}

    def detect(self, predictions: DensePredictions, classes: Classes, size: tuple[int, int]) -> list[Tensor]:
        """What a teacher detects.

        Args:
            predictions: The teacher's, of a batch.
            classes: ``(student_index, teacher_index)`` of the classes that both know; None: all, in the same order.
            size: ``(H, W)`` of the images in pixels.

        Returns:
            Per image ``(n, 6)`` float32: box ``x1, y1, x2, y2`` in pixels inside the image, score, and the class as the
            student numbers it; by falling score.

        Raises:
            DistillError: The boxes cannot be decoded.
        """
        scores = predictions.class_probabilities().float()
        if predictions.obj is not None:
            scores = scores * predictions.obj.float().sigmoid()
        numbers = torch.arange(scores.shape[-1], device=scores.device)
        if classes is not None:
            scores = scores[..., list(classes[1])]
            numbers = torch.as_tensor(list(classes[0]), device=scores.device)
        best, kind = scores.max(-1)
        height, width = size
        boxes = predictions.boxes().float()
        boxes = torch.stack([boxes[..., i].clamp(0, (width, height)[i % 2]) for i in range(4)], -1)
        # Of less than a pixel nothing can be learnt.
        keep = (best > self.score) & (boxes[..., 2:] - boxes[..., :2] > 1).all(-1)
        found = []
        for i in range(len(boxes)):
            rows = torch.cat([boxes[i], best[i, :, None], numbers[kind[i]][:, None].float()], -1)[keep[i]]
            found.append(rows[_suppress(rows, self.nms)])
        return found

    def missing(self, found: Tensor, labels: Tensor) -> Tensor:
        """The detections of an image that no label stands for.

        Args:
            found: ``(n, 6)`` from :meth:`detect`.
            labels: ``(m, 4)`` boxes of all labels of the image, ``x1, y1, x2, y2`` in pixels.
        """
        if not len(found) or not len(labels):
            return found
        from torchvision.ops import box_iou

        return found[box_iou(found[:, :4], labels.to(found)).amax(1) <= self.iou]

    def __str__(self) -> str:
        return (
            f"the teacher's detections of classes it shares (score above {self.score:g}) become labels where there is "
            'none'
        )


def _suppress(rows: Tensor, overlap: float) -> Tensor:
    """Indices that non-maximum suppression within each class keeps, by falling score."""
    try:
        from torchvision.ops import batched_nms
    except ImportError as error:
        raise DistillError('pseudo_labels needs torchvision (pip install torchvision).') from error
    return batched_nms(rows[:, :4], rows[:, 4], rows[:, 5].long(), overlap)
