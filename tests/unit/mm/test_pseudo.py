"""Pseudo-labels in mmdet's data samples."""

import pytest
import torch

pytest.importorskip('mmdet')

from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from kd_plugins.errors import DistillError
from kd_plugins.mm.pseudo import refuse_unlabelled, with_labels
from kd_plugins.teachers.pseudo import PseudoLabels


def sample(boxes, labels, ignored=None, **more):
    found = DetDataSample(metainfo=dict(img_shape=(40, 80)))
    found.gt_instances = InstanceData(bboxes=torch.tensor(boxes).view(-1, 4), labels=torch.tensor(labels), **more)
    if ignored is not None:
        found.ignored_instances = InstanceData(bboxes=torch.tensor(ignored).view(-1, 4))
    return found


def test_detections_join_the_labels():
    known = sample([[0.0, 0, 40, 40]], [3], ignored=[[60.0, 10, 80, 30]])
    empty = sample([], torch.zeros(0, dtype=torch.long).tolist())
    empty.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    # One that has a label, one in a region of which nothing is known, one that is new.
    rows = torch.tensor([[0, 0, 40, 38, 0.9, 1], [60, 10, 80, 29, 0.8, 2], [45, 5, 58, 20, 0.7, 2]])
    first, second = with_labels([known, empty], [rows, rows[:1]], PseudoLabels())
    assert first.gt_instances.labels.tolist() == [3, 2] and first.gt_instances.labels.dtype == torch.long
    assert first.gt_instances.bboxes.tolist() == [[0, 0, 40, 40], [45, 5, 58, 20]]
    assert second.gt_instances.labels.tolist() == [1] and second.img_shape == (40, 80)
    assert len(known.gt_instances) == 1 and not len(empty.gt_instances), 'the data set may keep its samples'


def test_labels_of_more_than_boxes_are_refused():
    refuse_unlabelled(None)
    refuse_unlabelled([sample([[0.0, 0, 4, 4]], [0])])
    with pytest.raises(DistillError, match='also hold masks; take that out of the pipeline'):
        refuse_unlabelled([sample([[0.0, 0, 4, 4]], [0], masks=torch.zeros(1, 4, 4))])
