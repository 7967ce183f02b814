"""Promise 18: distillation together with what else a run can switch on."""

import copy

import pytest
import torch

from kd_plugins.errors import DistillError
from tests.integration.lab import FEATURES, GROUP_NORM, LOGITS, Probe, difference, distill_hook, ema, weights

BOTH = dict(features=FEATURES, logits=LOGITS)
SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4)


def student_only(state):
    return {k: v for k, v in state.items() if k.startswith('student.')}


def train(lab, config):
    probe = Probe()
    runner = lab.train(config, probe)
    return runner, probe.logs


def distilled(lab, form, terms=None, **options):
    config = lab.plain(**options)
    terms = terms or (dict(logits=LOGITS) if form == 'hook_form' else BOTH)
    return getattr(lab, form)(config, lab.teacher(), terms)


def assert_distilled(logs, terms):
    for log in logs:
        for name in terms:
            assert log[f'loss_kd_{name}'] > 0
        assert all(torch.tensor(list(log.values())).isfinite())


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_bf16_autocast(lab, form):
    """The KD losses of a bf16 run are those of the float32 run within bf16's precision, and not in bf16 themselves."""
    _, full = train(lab, distilled(lab, form))
    amp = distilled(lab, form, optim_wrapper__type='Bf16OptimWrapper')
    runner, half = train(lab, amp)
    names = list(distill_hook(runner).session.terms)
    assert_distilled(half, names)
    for name in names:
        key = f'loss_kd_{name}'
        assert half[0][key] == pytest.approx(full[0][key], rel=0.1)
        assert any(torch.tensor(log[key]).bfloat16().item() != log[key] for log in half), 'computed in bf16'
    assert all(p.dtype == torch.float32 for p in runner.model.parameters())
    _, silent = train(lab, _silenced(amp))
    assert half[-1]['loss_cls'] != silent[-1]['loss_cls'], 'the KD gradient did not reach the student'


def _silenced(config):
    config = copy.deepcopy(config)
    config.work_dir, config.experiment_name = config.work_dir + '0', config.experiment_name + '0'
    distill = config.model.get('distill') or config.default_hooks.distill
    for term in distill['terms'].values():
        term['weight'] = 0.0
    return config


@pytest.mark.gpu
@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_fp16_autocast_with_loss_scaling(lab, form):
    runner, logs = train(
        lab, distilled(lab, form, optim_wrapper__type='AmpOptimWrapper', optim_wrapper__loss_scale='dynamic')
    )
    assert_distilled(logs, distill_hook(runner).session.terms)
    assert next(distill_hook(runner).session.teacher.model.parameters()).is_cuda


NO_TASK = """
model['bbox_head']['loss_cls'] = dict(
    type='CrossEntropyLoss', use_sigmoid=True, reduction='sum', loss_weight=0.0)
model['bbox_head']['loss_obj'] = dict(
    type='CrossEntropyLoss', use_sigmoid=True, reduction='sum', loss_weight=0.0)
model['bbox_head']['loss_bbox'] = dict(type='IoULoss', mode='square', eps=1e-16, reduction='sum', loss_weight=0.0)
"""


def test_gradient_accumulation_equals_the_large_batch(lab):
    """Two batches of two accumulated are one of four; only KD has weight, as YOLOX's loss depends on the batch."""
    states = []
    for batch, counts in ((4, 1), (2, 2)):
        config = lab.plain(
            steps=2 * counts,
            extra=GROUP_NORM + NO_TASK,
            model__data_preprocessor__pad_size_divisor=96,
            train_dataloader__batch_size=batch,
            optim_wrapper__accumulative_counts=counts,
            param_scheduler=[],
        )
        config.train_dataloader.dataset.pipeline[3].prob = 0.0
        config.train_dataloader.sampler.shuffle = False
        runner, logs = train(lab, lab.model_form(config, lab.teacher(), BOTH))
        assert_distilled(logs, BOTH)
        adapters = {f'adapters.{k}': v for k, v in distill_hook(runner).session.bank.export_state().items()}
        states.append({**student_only(weights(runner)), **adapters})
    far = difference(*states)
    assert max(far.values(), default=0) < 1e-6, max(far.items(), key=lambda kv: kv[1])
    moved = difference(states[0], _initial(lab))
    assert max(v for v in moved.values() if v != float('inf')) > 1e-4


def _initial(lab):
    config = lab.plain(extra=GROUP_NORM + NO_TASK)
    return {f'student.{k}': v for k, v in lab.build(config).state_dict().items()}


def checkpointed(lab, tap, modules):
    config = lab.plain(extra=GROUP_NORM)  # BatchNorm's statistics would be updated twice
    if modules:
        config.activation_checkpointing = modules
    term = dict(loss=dict(type='FeatureMSELoss'), student=tap, teacher=tap)
    return lab.model_form(config, lab.teacher(), dict(features=term))


@pytest.mark.parametrize('tap', ['backbone.stage4', 'neck'], ids=['the checkpointed module', 'after it'])
@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad', 'ignore:torch.utils.checkpoint')
def test_activation_checkpointing(lab, tap):
    """Recomputed activations change neither what a tap records nor the gradient.

    MMEngine's wrapper sets ``forward`` on the instance, which a tap has to keep.
    """
    modules = ['backbone.stage4']
    states, logs = [], []
    for chosen in (None, modules):
        runner, log = train(lab, checkpointed(lab, tap, chosen))
        assert_distilled(log, ['features'])
        states.append(student_only(weights(runner)))
        logs.append(log)
        assert [n for n, m in runner.model.named_modules() if 'forward' in m.__dict__] == (chosen or [])
    assert logs[1] == [pytest.approx(log, rel=1e-5) for log in logs[0]]
    assert max(difference(*states).values(), default=0) < 1e-6


@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad', 'ignore:torch.utils.checkpoint')
def test_activation_checkpointing_of_the_whole_backbone(lab):
    """The losses of the first iteration are those without it (MMEngine then trains the layers after it only)."""
    logs = [train(lab, checkpointed(lab, 'neck', modules))[1] for modules in (None, ['backbone'])]
    assert_distilled(logs[1], ['features'])
    assert logs[1][0] == pytest.approx(logs[0][0], rel=1e-5)


@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad', 'ignore:torch.utils.checkpoint')
def test_a_tap_inside_a_checkpointed_module_is_refused(lab):
    """What it records there carries no gradient: distilling would silently train nothing."""
    with pytest.raises(DistillError, match='inside an activation-checkpointed module'):
        train(lab, checkpointed(lab, 'backbone.stage4.2', ['backbone.stage4']))


@pytest.mark.parametrize('update_buffers', [True, False])
def test_ema_averages_the_student_alone(lab, update_buffers):
    """The average is what EMAHook's formula gives on the student's own weights, in the model form too."""
    config = distilled(lab, 'model_form', BOTH)
    config.custom_hooks[0].update(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.3)
    config.custom_hooks[0].update(update_buffers=update_buffers)
    expected = {}

    def follow(runner):
        for key, value in runner.model.named_parameters():
            if not key.startswith('kd_adapters'):
                before = expected.get(key)
                expected[key] = value.detach().clone() if before is None else before.lerp(value.detach(), 0.3)

    probe = Probe(follow)
    runner = lab.train(config, probe)
    assert_distilled(probe.logs, BOTH)
    averaged = dict(ema(runner).module.named_parameters())
    for key, value in expected.items():
        assert torch.allclose(averaged[key], value, atol=1e-6), key
    assert not [k for k in ema(runner).state_dict() if 'kd_adapters' in k]


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_paramwise_options_stay_the_students(lab, form):
    """Groups of the student's parameters are those of the plain run; adapters have the defaults."""
    rules = dict(norm_decay_mult=0, bias_decay_mult=0, custom_keys={'backbone': dict(lr_mult=0.1)})
    options = dict(optim_wrapper__paramwise_cfg=rules, param_scheduler=[])
    plain, _ = train(lab, lab.plain(**options))
    runner, logs = train(lab, distilled(lab, form, **options))
    assert_distilled(logs, distill_hook(runner).session.terms)

    def rates(runner):
        names = {id(p): n for n, p in runner.model.named_parameters()}
        groups = runner.optim_wrapper.param_groups
        # The last group is MMEngine's own record of the base settings, with no parameter of the model.
        return {names[id(p)]: (g['lr'], g['weight_decay']) for g in groups for p in g['params'] if id(p) in names}

    ours, theirs = rates(runner), rates(plain)
    assert {k: v for k, v in ours.items() if k in theirs} == theirs
    adapters = {k: v for k, v in ours.items() if k not in theirs}
    assert (form == 'model_form') == bool(adapters)
    for key, rate in adapters.items():
        assert rate == (SGD['lr'], 0 if key.endswith('bias') else SGD['weight_decay']), key


@pytest.mark.slow
@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_compiled_training_equals_eager_training(lab, form):
    def config(**options):
        terms = (
            dict(logits=LOGITS)
            if form == 'hook_form'
            else dict(features=dict(FEATURES, student='backbone[3]', teacher='backbone[3]'))
        )
        plain = lab.plain('gfl', train_dataloader__batch_size=4 if form == 'hook_form' else 8, **options)
        return getattr(lab, form)(plain, lab.teacher('gfl'), terms)

    torch._dynamo.reset()
    one, eager = train(lab, config())
    other, compiled = train(lab, config(compile=dict(backend='eager')))
    assert_distilled(compiled, distill_hook(other).session.terms)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert max(difference(weights(one), weights(other)).values(), default=0) < 1e-5
    torch._dynamo.reset()


def test_adapters_learn(lab):
    """A projector that never reaches the optimizer is the classic silent failure."""
    start, end = [], []
    config = distilled(lab, 'model_form')

    class Watch(Probe):
        def before_train(self, runner):
            start.append({k: v.clone() for k, v in runner.model.kd_adapters.named_parameters()})

    runner = lab.train(config, Watch())
    end = dict(runner.model.kd_adapters.named_parameters())
    assert len(end) == 6 and set(start[0]) == set(end)
    assert all(not torch.equal(start[0][k], end[k]) for k in end)
