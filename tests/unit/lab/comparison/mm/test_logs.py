"""Logs are read as MMEngine writes them, also those of runs that were killed and resumed."""

import json
import math

import pytest

from kd_plugins.lab.comparison.mm.logs import RunnerProgress, find_metric, read_history, read_test_metrics

TRAIN = (
    '11/21 10:37:25 - mmengine - INFO - Epoch(train)  [4][60/63]  base_lr: 1.9e-03 lr: 1.9e-03  eta: 0:12:51  '
    'time: 0.9660  data_time: 0.0473  grad_norm: 6.3653  loss: 7.1503  loss_cls: 2.3035'
)
VAL = '11/21 10:45:23 - mmengine - INFO - Epoch(val) [20][10/10]    coco/bbox_mAP: 0.4070  coco/bbox_mAP_50: 0.6810'


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def test_progress_of_a_training():
    progress = RunnerProgress()
    assert progress.update(TRAIN, 'train', 24)
    assert progress.done == pytest.approx((3 + 60 / 63) / 24)
    assert (progress.epoch, progress.loss) == (4, 7.1503)
    assert progress.update(VAL, 'train', 24)
    assert progress.metric == 0.407
    assert progress.done == pytest.approx((3 + 60 / 63) / 24), 'a validation is no progress of the training'
    assert not progress.update('Exp name: student', 'train', 24)


def test_progress_of_other_loops():
    progress = RunnerProgress()
    progress.update('Iter(train) [ 500/2000]  loss: nan', 'train', None)
    assert progress.done == 0.25 and math.isnan(progress.loss)
    progress = RunnerProgress()
    progress.update('Epoch(test) [ 5/20]  eta: 0:00:01', 'test', None)
    assert progress.done == 0.25


def test_a_resumed_run_overwrites_what_it_repeats(tmp_path):
    def line(step, loss, epoch=1, **more):
        return dict(step=step, iter=step, epoch=epoch, loss=loss, time=step / 100, **more)

    first = [line(10, 5.0), line(20, 4.0), {'step': 1, 'coco/bbox_mAP': 0.1}, line(30, 9.0, 2), '{"step": 40, "lo']
    write(tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json', *first)
    write(
        tmp_path / '20260101_010000' / 'vis_data' / 'scalars.json',
        line(30, 3.0, 2),
        line(40, 2.0, 2),
        {'step': 2, 'coco/bbox_mAP': 0.2},
    )
    history = read_history(tmp_path)
    assert history.curve('loss') == ([0.5, 1.0, 1.5, 2.0], [5.0, 4.0, 3.0, 2.0])
    assert history.metric_curve('coco/bbox_mAP') == ([1.0, 2.0], [0.1, 0.2])
    assert history.seconds_per_iteration() == pytest.approx(0.3), 'median without the first line'


def test_metrics_of_the_last_evaluation(tmp_path):
    assert read_test_metrics(tmp_path) == {}
    write(tmp_path / '20260101_000000' / '20260101_000000.json', {'coco/bbox_mAP': 0.1})
    write(tmp_path / '20260101_010000' / '20260101_010000.json', {'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_50': 0.4})
    metrics = read_test_metrics(tmp_path)
    assert find_metric(metrics, 'bbox_mAP') == 0.2
    assert find_metric(metrics, 'bbox_mAP_50') == 0.4
    assert math.isnan(find_metric(metrics, 'mIoU'))
