"""What kind a model is, by what it offers, and its labels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip('mmengine')

from mmengine.structures import BaseDataElement
from torch import nn

from kd_plugins.distiller import Tap
from kd_plugins.mm.forward import openmmlab_tap
from kd_plugins.mm.targets import image_labels
from kd_plugins.mm.task import task_of
from kd_plugins.predictions import ClassPredictions, register_reader

IMAGES = torch.zeros(2, 3, 4, 4)


class Head(nn.Linear):
    """Of somebody else's classifier."""


@register_reader(Head, form=ClassPredictions)
def read_head(head, outputs, *, training):
    return ClassPredictions(outputs)


def model(**children):
    found = nn.Module()
    for name, child in children.items():
        found.add_module(name, child)
    return found


def test_a_head_of_class_logits_makes_a_classifier():
    classifier = model(backbone=nn.Conv2d(3, 4, 1), neck=None, head=Head(4, 2))
    task = task_of(classifier)
    assert (task.name, task.head) == ('classification', 'head')
    assert openmmlab_tap(classifier, Tap.parse('logits', 'student'), 'student').module == 'head'
    # Of several tasks.
    assert task_of(model(head=nn.ModuleDict(dict(kind=Head(4, 2))))).name == 'classification'


@pytest.mark.parametrize('child', [None, nn.Linear(4, 2)], ids=['none', 'another'])
def test_other_heads_of_that_name_do_not(child):
    assert task_of(model(head=child)).head == ''
    assert task_of(model(head=child, bbox_head=nn.Identity())).head == 'bbox_head'


def sample(**fields):
    return BaseDataElement(**{k: torch.tensor(v) for k, v in fields.items()})


LABELS = {
    'in lists of one': ([dict(gt_label=[3]), dict(gt_label=[0])], [3, 0]),
    'bare': ([dict(gt_label=3), dict(gt_label=0)], [3, 0]),
    'mixed': ([dict(gt_label=[1], gt_score=[0.3, 0.7]), dict(gt_label=[0], gt_score=[1.0, 0.0])], [[0.3, 0.7], [1, 0]]),
    'any number': ([dict(gt_label=[0.0, 1.0, 1.0]), dict(gt_label=[0.0, 0.0, 0.0])], [[0, 1, 1], [0, 0, 0]]),
    'as many as it has': ([dict(gt_label=[1, 2]), dict(gt_label=[0])], None),
    'two each': ([dict(gt_label=[1, 2]), dict(gt_label=[0, 2])], None),
    'none': ([dict(), dict()], None),
    'of one class': ([dict(gt_score=[1.0]), dict(gt_score=[0.0])], [[1.0], [0.0]]),
}


@pytest.mark.parametrize('samples, expected', LABELS.values(), ids=LABELS)
def test_labels_of_whole_images(samples, expected):
    found = image_labels(IMAGES, [sample(**fields) for fields in samples])
    assert (None if found is None else [pytest.approx(row) for row in found.tolist()]) == expected


def test_a_dry_run_has_labels_too():
    assert image_labels(IMAGES, None).tolist() == [0, 0]
