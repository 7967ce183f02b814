"""Distillation together with what else a run can switch on, for all kinds of MMEngine's models."""

from __future__ import annotations

import math

import pytest
import torch

from kd_plugins.errors import DistillError
from tests.integration.labs import kept
from tests.integration.promises import difference, is_on

RECOMPUTES = pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad', 'ignore:torch.utils.checkpoint')


@pytest.fixture
def lab(request, labs):
    """The lab of a case."""
    return labs(request.param)


def assert_distilled(steps):
    assert steps and all(map(is_on, steps))
    assert all(math.isfinite(v) for step in steps for v in (step.total, *step.own.values(), *step.kd.values()))


@kept('bf16')
def test_bf16_autocast(lab, case):
    """KD losses of a bf16 run are those of the float32 run within bf16's precision, not in bf16 themselves, and reach
    the student."""
    half = case.but(options=dict(optim_wrapper__type='Bf16OptimWrapper'))
    full, ours, silent = (lab.record(lab.distil(chosen)) for chosen in (case, half, half.silent()))
    assert_distilled(ours.steps)
    for name in (f'loss_kd_{term}' for term in case.terms):
        values = [step.kd[name] for step in ours.steps]
        assert values[0] == pytest.approx(full.steps[0].kd[name], rel=lab.BF16)
        assert any(torch.tensor(value).bfloat16().item() != value for value in values), 'computed in bf16'
    for part in (ours.model, ours.session.bank):
        assert all(p.dtype == torch.float32 for p in part.parameters())
    losses, others = ours.steps[-1].own, silent.steps[-1].own
    first = next(name for name in losses if 'loss' in name)  # of the class scores
    assert losses[first] != others[first], 'the KD gradient did not reach the student'


@pytest.mark.gpu
@kept('bf16')
def test_fp16_autocast_with_loss_scaling(lab, case):
    scaled = dict(optim_wrapper__type='AmpOptimWrapper', optim_wrapper__loss_scale='dynamic')
    ours = lab.record(lab.distil(case.but(options=scaled)))
    assert_distilled(ours.steps)
    assert next(ours.teacher.model.parameters()).is_cuda


@kept('accumulation')
def test_gradient_accumulation_equals_the_large_batch(lab, case):
    """Two batches accumulated are one of twice the size, for losses that are means over the images."""
    states, initial = [], {}

    def before(runner):
        initial.update({k: v.clone() for k, v in runner.model.state_dict().items()})

    for counts in (1, 2):
        options = dict(
            steps=2 * counts,
            train_dataloader__batch_size=case.options['train_dataloader__batch_size'] * (3 - counts),
            optim_wrapper__accumulative_counts=counts,
            train_dataloader__sampler__shuffle=False,
            param_scheduler=[],
        )
        config = lab.plain_of(case.but(options=options))
        config.custom_hooks = []
        ours = lab.record(lab.distil(case, config), before=before)
        assert_distilled(ours.steps)
        assert len(ours.steps) == 2 * counts and bool(ours.adapters) == bool(case.trained)
        states.append({**ours.model.state_dict(), **{f'adapters.{k}': v for k, v in ours.adapters.items()}})
    moved = difference(initial, {k: states[0][k] for k in initial})
    assert max(moved.values()) > 1e-4
    far = difference(*states)
    assert max(far.values(), default=0) < 1e-6, max(far.items(), key=lambda item: item[1])


@RECOMPUTES
@kept('checkpointing')
def test_activation_checkpointing(lab, case):
    """Recomputed activations change neither what a tap records nor the gradient, random depth included.

    MMEngine's wrapper sets ``forward`` on the instance, which a tap of the module itself has to keep.
    """
    records, counts = [], []
    for options, own in ((dict(), False), (case.recompute, not case.recompute)):
        ran = [0]

        def begin(runner, own=own, ran=ran):
            def count(*_):
                ran[-1] += 1

            if own:
                runner.model.net.set_grad_checkpointing()
            runner.model.get_submodule(case.inside).register_forward_hook(count)

        config = lab.distil(case.but(options=options))
        records.append(lab.record(config, before=begin, check=lambda runner, ran=ran: ran.append(0)))
        counts.append(ran[:-1])
    first, again = records
    assert_distilled(first.steps)
    for ours, theirs in zip(first.steps, again.steps, strict=True):
        assert ours.total == pytest.approx(theirs.total, rel=1e-5)
        assert {**ours.own, **ours.kd} == pytest.approx({**theirs.own, **theirs.kd}, rel=1e-5)
    assert max(difference(first.weights, again.weights).values(), default=0) < 1e-6
    assert counts == [[1] * 4, [2] * 4], 'nothing was recomputed'
    left = [[n for n, m in record.model.named_modules() if 'forward' in m.__dict__] for record in records]
    assert left == [[], case.recompute.get('activation_checkpointing', [])]


@RECOMPUTES
@kept('checkpointed_trunk')
def test_activation_checkpointing_of_the_whole_backbone(lab, case):
    """The losses of the first iteration are those without it (MMEngine then trains the layers after it only)."""
    first, again = (lab.record(lab.distil(case.but(options=options))) for options in (dict(), case.recompute))
    assert_distilled(again.steps)
    one, other = first.steps[0], again.steps[0]
    assert other.total == pytest.approx(one.total, rel=1e-5)
    assert {**other.own, **other.kd} == pytest.approx({**one.own, **one.kd}, rel=1e-5)


@RECOMPUTES
@kept('no_gradient')
def test_a_tap_without_gradient_is_refused_before_the_run(lab, case):
    """Distilling there would train nothing; not in the iteration in which KD starts, which may be hours later."""
    from tests.integration.lab import Probe

    logs = Probe()
    with pytest.raises(DistillError, match=r'carries no gradient.*inside an activation-checkpointed module'):
        lab.train(lab.distil(case), logs)
    assert not logs.logs


@pytest.mark.parametrize('update_buffers', [True, False])
@kept('average')
def test_the_average_is_of_the_student_alone(lab, case, update_buffers):
    """It is what EMAHook's formula gives on the student's own weights, also where adapters are trained."""
    config = lab.distil(case)
    config.custom_hooks[0].update(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.3)
    config.custom_hooks[0].update(update_buffers=update_buffers)
    expected = {}

    def follow(runner):
        for key, value in runner.model.named_parameters():
            before = expected.get(key)
            expected[key] = value.detach().clone() if before is None else before.lerp(value.detach(), 0.3)

    ours = lab.record(config, check=follow)
    assert_distilled(ours.steps)
    averaged = dict(ours.averaged.named_parameters())
    assert set(averaged) == set(expected)
    for key, value in expected.items():
        assert torch.allclose(averaged[key], value, atol=1e-6), key
    assert not [k for k in ours.averaged.state_dict() if 'adapter' in k]


@kept('paramwise')
def test_paramwise_options_stay_the_students(lab, case):
    """Rates and decays of the student's parameters are those of the plain run; adapters have the optimizer's own."""
    optimizers = []

    def rates(config):
        ours = lab.record(config, check=lambda runner: optimizers.append(lab.adapter_groups(runner)))
        names = {id(p): n for n, p in ours.model.named_parameters()}
        # The last group is MMEngine's own record of the base settings, with no parameter of the model.
        groups = ours.run.optim_wrapper.param_groups
        found = {names[id(p)]: (g['lr'], g['weight_decay']) for g in groups for p in g['params'] if id(p) in names}
        return found, ours.steps

    (theirs, _), (ours, steps) = rates(lab.plain_of(case)), rates(lab.distil(case))
    assert ours == theirs
    assert_distilled(steps)
    base = lab.plain_of(case).optim_wrapper.optimizer
    rules = case.options['optim_wrapper__paramwise_cfg']
    (factor,) = {rule['lr_mult'] for rule in rules['custom_keys'].values()}
    assert {rate for rate, _ in theirs.values()} == {base.lr, base.lr * factor}
    assert {decay for _, decay in theirs.values()} == {base.weight_decay, 0.0}
    assert optimizers == [[], [(base.lr, base.weight_decay)] if case.trained else []]


@pytest.mark.long
@kept('compiled')
def test_compiled_training_equals_eager_training(lab, case):
    """From before ``start`` to after ``stop``, where what is compiled changes."""
    records = []
    for options in ({}, dict(compile=dict(backend='eager'))):
        torch._dynamo.reset()
        records.append(lab.record(lab.distil(case.but(options=options))))
    torch._dynamo.reset()
    eager, compiled = records
    assert [str(int(is_on(step))) for step in compiled.steps] == list(case.on)
    for ours, theirs in zip(compiled.steps, eager.steps, strict=True):
        assert ours.total == pytest.approx(theirs.total, rel=1e-4)
        assert {**ours.own, **ours.kd} == pytest.approx({**theirs.own, **theirs.kd}, rel=1e-4)
    assert max(difference(eager.weights, compiled.weights).values(), default=0) < 1e-5
