"""Which evaluator counts, and what it logs, in [0, 1]."""

import math

import pytest
from mmengine.config import Config

from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison.mm.logs import RunnerProgress
from kd_plugins.lab.comparison.mm.tasks import (
    CLASSIFICATION,
    DETECTION,
    MULTI_LABEL,
    SEGMENTATION,
    classification,
    find_evaluator,
)

COCO, IOU = dict(type='CocoMetric', metric='bbox'), dict(type='IoUMetric', iou_metrics=['mIoU'])


@pytest.mark.parametrize(
    ('evaluator', 'task', 'key'),
    [
        (COCO, DETECTION, 'test_evaluator'),
        (IOU, SEGMENTATION, 'test_evaluator'),
        (dict(type='mmseg.IoUMetric'), SEGMENTATION, 'test_evaluator'),
        ([dict(type='DumpResults'), dict(IOU, ignore_index=11)], SEGMENTATION, 'test_evaluator.1'),
        (dict(type='kd_plugins.Accuracy'), CLASSIFICATION, 'test_evaluator'),
        (dict(type='kd_plugins.Accuracy', topk=1), classification([1]), 'test_evaluator'),
        ([dict(type='kd_plugins.Accuracy', topk=(5, 1))], CLASSIFICATION, 'test_evaluator.0'),
        (dict(type='kd_plugins.MultiLabelAP'), MULTI_LABEL, 'test_evaluator'),
    ],
)
def test_evaluators(evaluator, task, key):
    found = find_evaluator(Config(dict(test_evaluator=evaluator)), '--student')
    assert found.task == task and found.key == key
    # With this key the folder for label maps reaches the right evaluator.
    config = Config(dict(test_evaluator=evaluator))
    config.merge_from_dict({f'{found.key}.output_dir': 'x'})
    assert find_evaluator(config, '--student').options == {**found.options, 'output_dir': 'x'}


@pytest.mark.parametrize(
    'evaluator',
    [None, dict(type='VOCMetric'), [], dict(IOU, format_only=True, output_dir='x'), dict(IOU, iou_metrics=['mDice'])],
)
def test_evaluators_that_cannot_be_compared(evaluator):
    with pytest.raises(DistillError, match=r'^--teacher: .*CocoMetric.*IoUMetric.*Accuracy.*MultiLabelAP'):
        find_evaluator(Config(dict(test_evaluator=evaluator)), '--teacher')


def test_accuracies_are_fractions():
    assert DETECTION.accuracy({'coco/bbox_mAP': 0.3, 'coco/bbox_mAP_50': 0.5}) == (0.3, 0.5)
    assert DETECTION.accuracy({'time': 1.0}) == (0.0, 0.0), 'CocoMetric is silent when nothing was detected'
    line = {'aAcc': 90.0, 'mIoU': 40.0, 'mAcc': 50.0, 'time': 2.0}
    assert SEGMENTATION.accuracy(line) == (0.4, 0.5)
    assert SEGMENTATION.fractions(line) == {'aAcc': 90.0, 'mIoU': 0.4, 'mAcc': 0.5, 'time': 2.0}
    assert all(map(math.isnan, SEGMENTATION.accuracy({}))), 'a missing metric is no zero'


def test_accuracies_of_classifiers():
    line = {'accuracy/top1': 80.0, 'accuracy/top5': 95.0, 'accuracy/top1_class_head': 70.0, 'time': 2.0}
    assert CLASSIFICATION.accuracy(line) == (0.8, 0.95)
    assert CLASSIFICATION.metrics.names == ('top-1', 'top-5') and CLASSIFICATION.metrics.main == 'top-1'
    few = classification((1,))
    assert few.metrics.names == ('top-1',) and few.accuracy(line) == (0.8,), 'no column for what is not measured'
    assert MULTI_LABEL.accuracy({'multi_label/mAP': 40.0, 'multi_label/CF1': 30.0, 'multi_label/OF1': 20.0}) == (
        0.4,
        0.3,
        0.2,
    )


def test_progress_of_a_classification():
    progress = RunnerProgress('top-1', 'top1', 100.0)
    line = (
        '11/21 20:06:03 - mmengine - INFO - Epoch(val) [3][6/6]    accuracy/top1_class_head: 61.0000  '
        'accuracy/top1: 62.5000  accuracy/top5: 90.0000  data_time: 0.1'
    )
    assert progress.update(line, 'train', 10)
    assert progress.metric == pytest.approx(0.625), 'both heads, not one of them'


def test_progress_of_a_segmentation():
    task = SEGMENTATION
    progress = RunnerProgress(task.metrics.main, task.logged[0], task.whole)
    line = '11/21 16:29:27 - mmengine - INFO - Iter(train) [ 50/800]  lr: 7.9e-04  loss: 0.5791  decode.loss_ce: 0.57'
    assert progress.update(line, 'train', None)
    assert (progress.done, progress.epoch, progress.loss) == (50 / 800, None, 0.5791)
    line = (
        '11/21 16:29:34 - mmengine - INFO - Iter(val) [25/25]    aAcc: 88.5900  mIoU: 8.0500  mAcc: 9.0900  time: 0.1'
    )
    assert progress.update(line, 'train', None)
    assert progress.metric == pytest.approx(0.0805) and progress.metric_name == 'mIoU'
    assert progress.done == 50 / 800, 'a validation is no progress of the training'
