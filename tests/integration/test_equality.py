"""Promise 13: where distillation has no weight, the run is the plain run, bit for bit."""

import copy

import pytest
import torch

from tests.integration.lab import DROPOUT, FEATURES, LOGITS, Probe, difference, distill_hook, ema, weights


def zero(term):
    return {**copy.deepcopy(term), 'weight': 0.0}


def assert_same_run(one, other, one_probe, other_probe):
    assert difference(weights(one), weights(other)) == {}
    assert len(one_probe.logs) == len(other_probe.logs) > 0
    for ours, plain in zip(other_probe.logs, one_probe.logs, strict=True):
        assert {k: v for k, v in ours.items() if 'kd' not in k} == plain


@pytest.mark.parametrize(
    ('family', 'extra'),
    [('yolox', ''), ('rtmdet', ''), ('gfl', ''), ('gfl', DROPOUT)],
    ids=['yolox', 'rtmdet', 'gfl', 'a student with dropout'],
)
def test_weight_zero_in_hook_form_equals_the_plain_run(lab, family, extra):
    config = lab.plain(family, extra=extra)
    plain, distilled = Probe(), Probe()
    one = lab.train(config, plain)
    other = lab.train(lab.hook_form(config, lab.teacher(family), dict(logits=zero(LOGITS))), distilled)
    assert distilled.logs[0]['loss_kd_logits'] == 0
    assert_same_run(one, other, plain, distilled)


@pytest.mark.parametrize('clip', [False, True], ids=['', 'clipped gradients'])
def test_weight_zero_in_model_form_equals_the_plain_run(lab, clip):
    options = dict(optim_wrapper__clip_grad=dict(max_norm=0.5)) if clip else {}
    config = lab.plain(**options)
    plain, distilled = Probe(), Probe()
    one = lab.train(config, plain)
    other = lab.train(lab.model_form(config, lab.teacher(), dict(features=zero(FEATURES))), distilled)
    assert distill_hook(other).session.trainable
    assert_same_run(one, other, plain, distilled)


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_before_start_the_run_is_the_plain_run(lab, form):
    config = lab.plain(steps=4)
    seen = []

    def keep(runner):
        seen[-1].append(weights(runner))

    for cfg in (config, getattr(lab, form)(config, lab.teacher(), start=2)):
        seen.append([])
        lab.train(cfg, Probe(keep))
    plain, distilled = seen
    for step in (0, 1):
        assert difference(plain[step], distilled[step]) == {}, step
    assert difference(plain[2], distilled[2]), 'distillation never started'


def test_the_plain_runs_batches_are_seen(lab):
    """A distilled run with weight draws the same images and flips as the plain run."""
    config = lab.plain()
    batches = []

    class Watch(Probe):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            batches[-1].append([t.clone() for t in data_batch['inputs']])

    for cfg in (config, lab.hook_form(config, lab.teacher()), lab.model_form(config, lab.teacher())):
        batches.append([])
        lab.train(cfg, Watch())
    for other in batches[1:]:
        for ours, theirs in zip(other, batches[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_first_task_losses_do_not_depend_on_distillation(lab):
    """KD adds terms; it neither replaces nor scales the student's own, and the EMA copy follows the student."""
    config = lab.plain()
    plain, distilled = Probe(), Probe()
    lab.train(config, plain)
    runner = lab.train(lab.hook_form(config, lab.teacher()), distilled)
    first, own = distilled.logs[0], plain.logs[0]
    assert {k: v for k, v in first.items() if k in own and k != 'loss'} == {k: v for k, v in own.items() if k != 'loss'}
    assert first['loss_kd_logits'] > 0
    assert first['loss'] == pytest.approx(own['loss'] + first['loss_kd_logits'], rel=1e-6)
    assert first['kd_ratio'] == pytest.approx(first['loss_kd_logits'] / own['loss'], rel=1e-5)
    assert ema(runner).steps > 0
