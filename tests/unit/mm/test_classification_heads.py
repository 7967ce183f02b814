"""mmpretrain's heads: what is read of each gives the scores that it predicts itself; the others say what to do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip('mmpretrain')

import mmpretrain.models  # noqa: F401
from mmpretrain.registry import MODELS
from torch import nn

import kd_plugins.mm  # noqa: F401
from kd_plugins.errors import DistillError
from kd_plugins.mm.task import task_of
from kd_plugins.predictions import ClassPredictions, read

CLASSES, WIDTH, IMAGES = 5, 8, 3
SIZES = dict(num_classes=CLASSES, in_channels=WIDTH)
BINARY = dict(type='CrossEntropyLoss', use_sigmoid=True)
VECTOR = (torch.randn(IMAGES, WIDTH, generator=torch.Generator().manual_seed(0)),)
MAP = (VECTOR[0][:, :, None, None].expand(-1, -1, 2, 2) * torch.linspace(0.5, 1.5, 4).view(2, 2),)
HEADS = {
    'linear': (dict(type='LinearClsHead', **SIZES), VECTOR, 'softmax'),
    'linear, trained as yes or no': (dict(type='LinearClsHead', **SIZES, loss=BINARY), VECTOR, 'either'),
    'smoothed': (
        dict(type='LinearClsHead', **SIZES, loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
        VECTOR,
        'softmax',
    ),
    'stacked': (dict(type='StackedLinearClsHead', **SIZES, mid_channels=[6]), VECTOR, 'softmax'),
    'transformer': (dict(type='VisionTransformerClsHead', **SIZES), VECTOR, 'softmax'),
    'two tokens': (dict(type='DeiTClsHead', **SIZES), ((VECTOR[0], VECTOR[0] * 2),), 'softmax'),
    'two networks': (
        dict(type='ConformerHead', num_classes=CLASSES, in_channels=[WIDTH, WIDTH]),
        ((VECTOR[0], VECTOR[0] * 2),),
        'softmax',
    ),
    'several labels': (dict(type='MultiLabelLinearClsHead', **SIZES), VECTOR, 'sigmoid'),
    'several labels, by attention': (dict(type='CSRAClsHead', **SIZES, num_heads=2, lam=0.1), MAP, 'sigmoid'),
}


def build(config):
    torch.manual_seed(0)
    head = MODELS.build(config).eval()
    for parameter in head.parameters():
        # Some start with zeros.
        torch.nn.init.normal_(parameter)
    return head


@pytest.mark.parametrize('config, features, activation', HEADS.values(), ids=HEADS)
def test_what_is_read_is_what_it_predicts(config, features, activation):
    head = build(config)
    with torch.no_grad():
        found = read(head, head(features), form=ClassPredictions)
        expected = torch.stack([sample.pred_score for sample in head.predict(features)])
    assert found.activation == activation and found.num_classes == CLASSES
    scores = found.logits.sigmoid() if activation == 'sigmoid' else found.logits.softmax(-1)
    torch.testing.assert_close(scores, expected)


REFUSED = {
    'margins': (dict(type='ArcFaceClsHead', **SIZES), 'ArcFaceClsHead cannot be read: in training its logits hold'),
    'numbers': (
        dict(type='LinearRegressionHead', num_classes=2, in_channels=WIDTH),
        'LinearRegressionHead cannot be read: it predicts numbers, not classes',
    ),
    'several tasks': (
        dict(type='MultiTaskHead', task_heads=dict(kind=dict(type='LinearClsHead', **SIZES))),
        "MultiTaskHead cannot be read: it predicts for several tasks; tap the head of one, 'head.task_heads.TASK'",
    ),
}


@pytest.mark.parametrize('config, words', REFUSED.values(), ids=REFUSED)
def test_what_has_no_class_logits_says_what_to_do(config, words):
    head = build(config)
    with pytest.raises(DistillError) as error:
        read(head, VECTOR, form=ClassPredictions)
    assert words in str(error.value)
    model = nn.Module()
    model.head = head
    # Recipes of classifiers, whose messages are those above.
    assert task_of(model).name == 'classification'
