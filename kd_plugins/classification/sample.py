"""What is known about one image of a classification data set, and what a classifier says about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor


def _tensor(name: str, doc: str) -> property:
    """A tensor field; the underscore is what BaseDataElement expects to find behind a property."""

    def get(self: BaseDataElement) -> Tensor:
        return getattr(self, f'_{name}')

    def put(self: BaseDataElement, value: Tensor) -> None:
        self.set_field(value, f'_{name}', dtype=Tensor)

    def remove(self: BaseDataElement) -> None:
        delattr(self, f'_{name}')

    return property(get, put, remove, doc)


class ClassSample(BaseDataElement):
    """Labels and scores of one image; an absent field raises AttributeError (use ``get`` or ``in``).

    Metainfo: ``img_path`` (a file, or ``name[index]`` for an image of an array) and ``img_shape`` ``(H, W)`` of the
    transformed image.
    """

    gt_label = _tensor('gt_label', 'LongTensor ``()``, the class; multi-label: FloatTensor ``(C,)`` of 0 and 1.')
    gt_score = _tensor('gt_score', 'FloatTensor ``(C,)``, the label after Mixup, CutMix or label smoothing.')
    pred_score = _tensor('pred_score', 'FloatTensor ``(C,)``, predicted probabilities.')
    pred_score_class = _tensor('pred_score_class', 'FloatTensor ``(C,)``, those of the class head alone.')
    pred_score_distillation = _tensor(
        'pred_score_distillation', "FloatTensor ``(C,)``, those of the distillation token's head alone."
    )


def class_labels(samples: Sequence[Any]) -> Tensor:
    """Labels of a batch of images.

    Args:
        samples: Its `ClassSample`.

    Returns:
        ``(B,)`` int64 classes; ``(B, num_classes)`` where they were mixed, or where an image has any number of them.
    """
    return torch.stack([s.gt_score if 'gt_score' in s else s.gt_label for s in samples])
