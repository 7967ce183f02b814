"""Curves, speed and progress are read from what Ultralytics writes."""

import pytest

from kd_plugins.lab.comparison.figures import task_loss
from kd_plugins.lab.comparison.yolo.logs import TrainerProgress, read_history

MAP = 'metrics/mAP50-95(B)'
CSV = """epoch,time,train/box_loss,train/cls_loss,train/kdcls_loss,train/dis_loss,metrics/mAP50-95(B),val/box_loss
1,10,3.0,2.0,0.5,0.25,0.1,9
2,18,2.0,1.0,0.5,0.25,0.2,9
3,7,1.0,1.0,0.5,0.25,0.3,9
4,16,1.0,0.5,0.5,0.25,0.4,9
"""


def test_history(tmp_path):
    (tmp_path / 'results.csv').write_text(CSV)
    history = read_history(tmp_path, MAP)
    assert history.curve('loss') == ([1, 2, 3, 4], [5.0, 3.0, 2.0, 1.5]), "the student's own losses only"
    assert task_loss(history)[1] == [5.0, 3.0, 2.0, 1.5]
    assert history.metric_curve(MAP) == ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])
    # The clock starts anew when a run is resumed (epoch 3); the first epoch contains the start.
    assert [line.get('time') for line in history.train.values()] == [10, 8, None, 9]
    assert history.seconds_per_iteration() == pytest.approx(8.5)


def test_an_epoch_that_was_not_validated_has_no_metric(tmp_path):
    """With ``val=False`` Ultralytics writes zeros for all epochs but the last."""
    rows = CSV.replace('0.1,9', '0,0').replace('0.3,9', '0,0').replace('0.2,9', '0,9')
    (tmp_path / 'results.csv').write_text(rows)
    assert read_history(tmp_path, MAP).metric_curve(MAP) == ([2, 4], [0.0, 0.4])


def test_no_history(tmp_path):
    assert read_history(tmp_path, MAP).train == {}


def test_progress():
    progress = TrainerProgress()
    line = (
        '\x1b[K       3/10         0G      1.646      2.891      1.362         41        128: 25% ━━╸──── 16/63 4.5it/s'
    )
    assert progress.update(line, 'train', 10)
    assert (progress.epoch, progress.done) == (3, pytest.approx(0.225))
    assert progress.update(
        '                   all        250        986      0.703      0.551      0.637      0.412', '', 10
    )
    assert progress.metric == 0.412
    assert not progress.update('Transferred 499/499 items', 'train', 10)


def test_progress_of_other_tasks():
    line = 'all         12         24      0.1      0.2      0.3      0.4      0.5      0.6      0.7      0.8'.rjust(
        110
    )
    for column, value in ((5, 0.4), (9, 0.8)):
        progress = TrainerProgress('mask mAP', column)
        assert progress.update(line, '', 1) and progress.metric == value and progress.metric_name == 'mask mAP'
    progress = TrainerProgress('top-1', 0)
    assert progress.update('                   all      0.667          1', '', 1) and progress.metric == 0.667


def test_the_loss_of_a_classifier(tmp_path):
    (tmp_path / 'results.csv').write_text(
        'epoch,time,train/loss,train/kdcls_loss,train/kd_ratio,metrics/accuracy_top1,val/loss\n1,3,2.0,0.5,0.25,0.75,1\n'
    )
    history = read_history(tmp_path, 'metrics/accuracy_top1')
    assert history.train[1] == dict(epoch=1, loss=2.0, loss_kd=0.5, time=3.0) and history.val[1] == {
        'metrics/accuracy_top1': 0.75
    }
