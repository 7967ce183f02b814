"""mmpretrain's heads, read into :class:`~kd_plugins.predictions.ClassPredictions`.

Registered by name, so importing this module imports no framework. What a head returns was taken from OneDL mmpretrain
1.3 and is tested against the scores that each head itself predicts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.predictions import ClassPredictions, register_reader, register_unreadable


@register_reader('mmpretrain.ClsHead', form=ClassPredictions)
def read_cls_head(head: nn.Module, outputs: Any, *, training: bool) -> ClassPredictions:
    """Logits of classes that exclude each other, as nearly all heads return."""
    losses: Any = getattr(head, 'loss_module', None)
    # Each a yes or no in training, and still the best of them is what is predicted.
    binary = isinstance(losses, nn.Module) and any(getattr(m, 'use_sigmoid', False) for m in losses.modules())
    return ClassPredictions(_one(head, outputs), 'either' if binary else 'softmax')


@register_reader('mmpretrain.MultiLabelClsHead', form=ClassPredictions)
def read_multi_label_head(head: nn.Module, outputs: Any, *, training: bool) -> ClassPredictions:
    """Logits of classes of which an image has any number."""
    return ClassPredictions(_one(head, outputs), 'sigmoid')


@register_reader('mmpretrain.ConformerHead', form=ClassPredictions)
def read_conformer_head(head: nn.Module, outputs: Any, *, training: bool) -> ClassPredictions:
    """Logits of its convolutions and of its transformer; their sum is what it predicts."""
    by_convolution, by_transformer = outputs
    return ClassPredictions(by_convolution + by_transformer)


register_unreadable(
    'mmpretrain.ArcFaceClsHead',
    "in training its logits hold the margin of the true class. Distil its features instead, e.g. student='backbone'.",
)
register_unreadable(
    'mmpretrain.RegressionHead', 'it predicts numbers, not classes. Distil its features instead (FeatureMSELoss).'
)
register_unreadable(
    'mmpretrain.MultiTaskHead', "it predicts for several tasks; tap the head of one, 'head.task_heads.TASK'."
)


def _one(head: nn.Module, outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    raise DistillError(
        f'{type(head).__name__} returned {type(outputs).__name__} instead of class logits (B, C); write a reader for '
        f'it: @register_reader({type(head).__name__!r}, form=ClassPredictions) of kd_plugins.predictions.'
    )
