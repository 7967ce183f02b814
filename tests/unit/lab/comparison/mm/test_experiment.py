"""What a recipe does to the log of a training is undone before its curves are drawn beside others."""

import math

import pytest

from kd_plugins.errors import DistillError
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


def test_every_combination_of_options_is_an_arm(tmp_path):
    config, weights = tmp_path / 'config.py', tmp_path / 't.pth'
    weights.write_bytes(b'1')
    config.write_text(
        "model = dict(type='kd_plugins.TimmClassifier')\ntrain_cfg = dict(max_epochs=1)\n"
        "test_evaluator = dict(type='kd_plugins.Accuracy', topk=1)\n"
    )

    def compare(*options, recipes=('kl', 'dist,vit_attention')):
        return Comparison(
            str(config),
            str(config),
            recipes,
            tmp_path / 'runs',
            teacher_checkpoint=str(weights),
            recipe_options=options,
        )

    comparison = compare(['weight=1,{type: linear, start: 1, end: 0}', 'alpha=0.7'])
    assert list(comparison.distilled) == [
        f'{recipe} {words} alpha=0.7' for recipe in ('kl', 'dist+vit_attention')
        for words in ('weight=1', 'weight=_type_linear_start_1_end_0_')
    ]  # fmt: skip
    phases = [comparison.train_student(arm, 0) for arm in comparison.distilled]
    where = phases[3].command.index('--kd-options')
    assert phases[3].command[where + 1 :] == ['weight={type: linear, start: 1, end: 0}', 'alpha=0.7']
    assert phases[3].command[phases[3].command.index('--kd') + 1] == 'dist,vit_attention'
    assert len({phase.fingerprint for phase in phases}) == 4
    assert comparison._recipes[comparison.distilled[0]]['alpha'] == 0.7, 'by which curves are read'
    with pytest.raises(DistillError, match="nothing has an option 'wieght'; did you mean 'weight'"):
        compare(['wieght=3'])
    with pytest.raises(DistillError, match='two arms would be called'):
        compare(['weight=3'], recipes=['kl', 'kl'])


def test_a_config_without_a_test_is_measured_on_its_validation(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        "model = dict(type='kd_plugins.TimmClassifier')\ntrain_cfg = dict(max_epochs=1)\nval_cfg = dict()\n"
        "val_dataloader = dict(batch_size=2, dataset=dict(type='kd_plugins.ImageFolder', root='data'))\n"
        "val_evaluator = dict(type='kd_plugins.Accuracy', topk=1)\n"
    )
    options = ['val_dataloader.batch_size=3', 'test_evaluator.topk=(1,2)']
    comparison = Comparison(
        str(config), str(config), ['kl'], tmp_path / 'runs', student_options=options, teacher_options=options[1:]
    )
    found = comparison.student_config
    assert comparison.teacher_config.test_evaluator == dict(type='kd_plugins.Accuracy', topk=(1, 2))
    assert (found.test_dataloader.batch_size, found.test_cfg, found.test_evaluator.topk) == (3, {}, (1, 2))
    assert found.val_evaluator.topk == 1, 'a copy'
