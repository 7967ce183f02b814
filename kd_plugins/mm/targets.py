"""The labels in a batch of data samples, for losses that need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Label of what batching added around an image; also what mmseg's data preprocessors write there.
PADDING = 255


def image_labels(inputs: Tensor, samples: Sequence[Any] | None) -> Tensor | None:
    """Labels of whole images, of ours or of another classifier's samples (``gt_label``, ``gt_score``).

    Args:
        inputs: ``(B, C, H, W)`` the processed batch.
        samples: Its data samples; None: every image is of class 0, for a dry run.

    Returns:
        ``(B,)`` int64 classes; ``(B, num_classes)`` where they were mixed, or where an image has any number of them.
        None where samples have no such labels (several tasks), or list classes without saying how many there are.
    """
    if samples is None:
        return inputs.new_zeros(len(inputs), dtype=torch.long)
    found = [sample.get('gt_score', sample.get('gt_label')) for sample in samples]
    if not found or any(label is None for label in found):
        return None
    # mmpretrain has a class in a list of one.
    found = [label if label.is_floating_point() or label.numel() != 1 else label.reshape(()) for label in found]
    if len({label.shape for label in found}) > 1 or (found[0].dim() and not found[0].is_floating_point()):
        return None
    return torch.stack(found).to(inputs.device)


def labels(inputs: Any, samples: Sequence[Any] | None) -> Tensor | None:
    """Label maps of a batch.

    Args:
        inputs: ``(B, 3, H, W)`` the processed batch.
        samples: Its data samples; None: every pixel is of class 0, for a dry run.

    Returns:
        ``(B, H, W)`` labels of semantic segmentation, 255 where there is only padding; None when the samples hold none.
    """
    if samples is None:
        return inputs.new_zeros((len(inputs), *inputs.shape[-2:]), dtype=torch.long)
    if not samples or not all(hasattr(sample, 'gt_sem_seg') for sample in samples):
        return None
    target = torch.stack([sample.gt_sem_seg.data.reshape(sample.gt_sem_seg.data.shape[-2:]) for sample in samples])
    height, width = target.shape[-2:]
    result = target
    for i, sample in enumerate(samples):
        # A data preprocessor may fill labels with a class (seg_pad_val=0); there is still no image.
        left, right, top, bottom = sample.metainfo.get('padding_size') or (0, 0, 0, 0)
        if left or right or top or bottom:
            result = target.clone() if result is target else result
            inside = result[i, top : height - bottom, left : width - right].clone()
            result[i] = PADDING
            result[i, top : height - bottom, left : width - right] = inside
    return result
