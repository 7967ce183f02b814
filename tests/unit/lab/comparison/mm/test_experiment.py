"""What a recipe does to the log of a training is undone before its curves are drawn beside others."""

import math

import pytest

from kd_plugins.lab.comparison.figures import task_loss
from kd_plugins.lab.comparison.history import History
from kd_plugins.lab.comparison.mm.experiment import Comparison, _without_balance


def test_own_loss_is_that_without_a_balance():
    # 0.1 x the student's own loss of 2 and 0.9 x a distillation loss of 4; then distillation has stopped.
    lines = [dict(loss=0.2 + 3.6, loss_kd_logits=3.6), dict(loss=2.0, loss_kd_logits=0.0)]
    history = History(train={i: _without_balance(line, 0.9) for i, line in enumerate(lines)})
    assert task_loss(history)[1] == pytest.approx([2, 2])
    assert _without_balance(lines[0], 0.9)['loss_kd_logits'] == 3.6


def test_own_loss_of_weight_zero_is_unknown():
    assert math.isnan(_without_balance(dict(loss=3.0, loss_kd_logits=3.0), 1.0)['loss'])


def test_curves_of_an_arm_know_its_balance(tmp_path):
    (tmp_path / 'logits.py').write_text('alpha = 0.9\nterms = dict(logits=dict())\n')
    config = tmp_path / 'config.py'
    config.write_text(
        "model = dict(type='kd_plugins.TimmClassifier')\ntrain_cfg = dict(max_epochs=1)\n"
        "test_evaluator = dict(type='kd_plugins.Accuracy', topk=1)\n"
    )
    comparison = Comparison(str(config), str(config), [str(tmp_path / 'logits.py')], tmp_path / 'runs')
    assert comparison.metrics.names == ('top-1',) and comparison.unit == 'epoch'
    for arm, loss in (('plain', 2.0), ('logits', 3.8)):
        log = tmp_path / 'runs' / 'seed0' / arm / 'train' / '20260101_000000' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        kd = ', "loss_kd_logits": 3.6' if arm == 'logits' else ''
        log.write_text(f'{{"loss": {loss}, "step": 1, "epoch": 1{kd}}}\n{{"accuracy/top1": 80.0, "step": 1}}\n')
        history = comparison.history(log.parents[2])
        assert task_loss(history)[1] == pytest.approx([2])
        assert history.val[1]['accuracy/top1'] == 0.8
