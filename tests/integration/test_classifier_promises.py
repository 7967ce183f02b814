"""What every distilled run promises, kept by classifiers, with and without a distillation token."""

import copy
import os
import random
import signal
from pathlib import Path

import mmengine.runner.checkpoint as mm
import numpy as np
import pytest
import timm
import torch
from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.mm import cli
from kd_plugins.teachers.frozen import FrozenTeacher
from tests.integration import child_hooks  # noqa: F401  (registers KillAt and Dump)
from tests.integration.cls_lab import CLASSES, FEATURES, LOGITS, SIZE, TOKEN
from tests.integration.lab import Probe, difference, distill_hook, ema, weights
from tests.integration.promises import (
    adapter_rates,
    adapters_of,
    interrupted,
    is_on,
    logged,
    own_losses,
    read,
    resumed,
    train,
    zero,
)

NORMED = {**FEATURES, 'adapter': dict(type='auto', norm=True)}
PROJECTED = dict(loss=dict(type='OFALoss'), student='stages[-2]', teacher='logits', adapter=dict(type='LogitProjector'))
# What a student learns in either form; the teacher is a ResNet.
HOOK, MODEL = ('hook_form', dict(logits=LOGITS)), ('model_form', dict(features=NORMED, ofa=PROJECTED))
TOKEN_HOOK, TOKEN_MODEL = ('hook_form', dict(token=TOKEN)), ('model_form', dict(token=TOKEN, **MODEL[1]))
CASES = pytest.mark.parametrize(
    ('family', 'form', 'terms'),
    [('resnet', *HOOK), ('resnet', *MODEL), ('deit', *TOKEN_HOOK), ('deit', *TOKEN_MODEL)],
    ids=['hook', 'model', 'token, hook', 'token, model'],
)
BOTH = pytest.mark.parametrize(
    ('family', 'form', 'terms'), [('resnet', *HOOK), ('deit', *TOKEN_MODEL)], ids=['hook', 'token, model']
)

# Draws from every generator there is, in the data set, in the data preprocessor and in the network.
AUGMENTED = """
model.update(drop_rate=0.1, drop_path_rate=0.2, label_smoothing=0.1, random_erasing=dict(probability=0.9, mode='pixel'),
             mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, mode='elem'))
train_dataloader['dataset']['transform'] = dict(
    model='vit_tiny_patch16_224', input_size=32, training=True, auto_augment='rand-m9-mstd0.5-inc1')
"""
# Draws from none, as MMEngine does not restore them.
DETERMINISTIC = "train_dataloader['dataset']['transform'] = None\n"
# Two iterations per epoch.
SHORT = dict(train_dataloader__batch_size=8)


def distilled(lab, config, form, terms, **options):
    return getattr(lab, form)(config, options.pop('teacher', None) or lab.teacher(), terms, **options)


def generators():
    """Where every random generator of a run stands."""
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


# ---------------------------------------------------------------------- weight 0, start, stop, schedules
@pytest.mark.parametrize(
    ('family', 'form', 'terms', 'options'),
    [
        ('convnext', *HOOK, {}),
        ('resnet', *MODEL, dict(optim_wrapper__clip_grad=dict(max_norm=0.5))),
        ('deit', *TOKEN_HOOK, dict(train_dataloader__num_workers=1)),
        ('deit', *TOKEN_MODEL, {}),
    ],
    ids=['hook', 'model, clipped gradients', 'token, hook, a worker', 'token, model'],
)
def test_weight_zero_equals_the_plain_run(cls_lab, family, form, terms, options):
    """Bit for bit, EMA included, with Mixup, CutMix, erasing, RandAugment, dropout and random depth."""
    config = cls_lab.plain(family, extra=AUGMENTED, **options)
    one, plain = train(cls_lab, config)
    assert [m for m in one.model.modules() if type(m).__name__ == 'DropPath' and m.drop_prob > 0]
    # An alpha has nothing to balance then, and with alpha 0 the weights have nothing to say.
    cases = [(zero(terms), dict(alpha=0.5)), (terms, dict(alpha=0.0))]
    for chosen, alpha in cases if form == 'hook_form' else cases[:1]:
        again = distilled(cls_lab, config, form, chosen, **alpha)
        again.experiment_name += str(alpha['alpha'])
        other, logs = train(cls_lab, again)
        assert ema(other).steps == 4
        assert bool(adapters_of(other)) == (form == 'model_form')
        assert [own_losses(log) for log in logs] == plain and len(plain) == 4
        assert difference(weights(one), weights(other)) == {}


@CASES
def test_a_teacher_at_work_moves_no_generator(cls_lab, family, form, terms):
    """A distilled run sees the plain run's images, mixed and erased alike, and drops the same paths."""
    config = cls_lab.plain(family, extra=AUGMENTED)
    seen, states = [], []

    class Watch(Probe):
        def before_train(self, runner):
            inner = runner.model.data_preprocessor.forward

            def forward(*args, **kwargs):
                seen[-1].append(inner(*args, **kwargs)['inputs'])
                return dict(inputs=seen[-1][-1], data_samples=args[0]['data_samples'])

            runner.model.data_preprocessor.forward = forward

    for cfg in (config, distilled(cls_lab, config, form, terms, teacher=cls_lab.teacher('deit', extra=AUGMENTED))):
        seen.append([])
        states.append([])
        cls_lab.train(cfg, Watch(lambda runner: states[-1].append(generators())))
    plain, ours = seen
    assert len(plain) == 4 and len(states[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert states[0] == states[1]


@pytest.fixture
def taught(monkeypatch):
    """Counts the teacher's runs."""
    calls = []
    inner = FrozenTeacher.outputs
    monkeypatch.setattr(FrozenTeacher, 'outputs', lambda self, *args: calls.append(1) or inner(self, *args))
    return calls


@CASES
def test_start_and_stop_count_epochs(cls_lab, family, form, terms, taught):
    """KD is on from ``start`` to before ``stop``, the run is the plain one before, and the teacher rests outside."""
    config = cls_lab.plain(family, extra=AUGMENTED, train_cfg__max_epochs=3, **SHORT)
    seen, ran = [], []

    def keep(runner):
        seen[-1].append(weights(runner))
        ran.append(len(taught))

    for cfg in (config, distilled(cls_lab, config, form, terms, start=1, stop=2)):
        seen.append([])
        ran.clear()
        _, logs = train(cls_lab, cfg, keep)
    plain, ours = seen
    assert [is_on(log, terms) for log in logs] == [False, False, True, True, False, False]
    assert [log['kd_ratio'] > 0 for log in logs] == [False, False, True, True, False, False]
    for step in (0, 1):
        assert difference(plain[step], ours[step]) == {}, step
    assert difference(plain[2], ours[2]), 'distillation never started'
    dry_runs = ran[0]
    assert [n - dry_runs for n in ran] == [0, 0, 1, 2, 2, 2]


def test_a_ramp_follows_the_iterations_of_the_run(cls_lab):
    """At learning rate 0 nothing but the weight differs between two runs, to the last digit of what is logged."""
    config = cls_lab.plain('deit', train_cfg__max_epochs=2, **SHORT, optim_wrapper__optimizer__lr=0.0)
    logs = {}
    for name, weight in (('constant', 1.0), ('ramp', dict(type='linear', start=0.5, end=2.5))):
        terms = dict(token={**TOKEN, 'weight': weight}, logits={**LOGITS, 'weight': weight})
        _, logs[name] = train(cls_lab, distilled(cls_lab, config, 'hook_form', terms, alpha=0.5))
    for weight, ramp, constant in zip((0.5, 1.0, 1.5, 2.0), logs['ramp'], logs['constant'], strict=True):
        for key in ('loss_kd_token', 'loss_kd_logits'):
            assert constant[key] > 0
            assert ramp[key] == pytest.approx(weight * constant[key], rel=1e-6)
        assert ramp['loss_cls'] == constant['loss_cls']


# ---------------------------------------------------------------------- checkpoints and the teacher
@pytest.fixture(scope='module')
def runs(cls_lab):
    """Plain runs and both forms: ``{name: (runner, path of its checkpoint)}``, and what the teacher was meanwhile."""
    found, prints = {}, []

    def check(runner):
        teacher = distill_hook(runner).session.teacher
        assert runner.model.training and not [n for n, m in teacher.model.named_modules() if m.training]
        prints.append(teacher.fingerprint())

    published = dict(default_hooks__checkpoint__published_keys=['state_dict'])
    for family, forms in (('resnet', (HOOK, MODEL)), ('deit', (TOKEN_HOOK, TOKEN_MODEL))):
        config = cls_lab.plain(family, extra='model.update(drop_path_rate=0.2)\n', **published)
        found[family, 'plain'] = train(cls_lab, config)[0]
        for form, terms in forms:
            found[family, form] = train(cls_lab, distilled(cls_lab, config, form, terms), check)[0]
    return {name: (runner, os.path.join(runner.work_dir, 'epoch_1.pth')) for name, runner in found.items()}, prints


@CASES
def test_checkpoints_are_those_of_the_plain_student(cls_lab, runs, family, form, terms):
    plain, (runner, path) = runs[0][family, 'plain'], runs[0][family, form]
    theirs, ours = read(plain[1]), read(path)
    for entry in ('state_dict', 'ema_state_dict'):
        assert list(ours[entry]) == list(theirs[entry])
        assert [(v.shape, v.dtype) for v in ours[entry].values()] == [
            (v.shape, v.dtype) for v in theirs[entry].values()
        ]
    assert set(ours) - set(theirs) == ({'kd_plugins'} if form == 'model_form' else set())
    model = cls_lab.build(cls_lab.plain(family), seed=3)
    mm.load_checkpoint(model, path, strict=True)  # raises on any missing or unexpected key
    averaged = {k.removeprefix('ema.module.'): v for k, v in weights(runner).items() if k.startswith('ema.module.')}
    assert difference(model.state_dict(), averaged) == {}
    assert difference(averaged, runner.model.state_dict()), 'EMA weights are the last ones'
    # Adapters and their momentum, each tensor with its entry in the archive; no trace of the teacher.
    adapters = ours.get('kd_plugins', {}).get('adapters', {})
    size = os.path.getsize(path) - 2 * 4 * sum(v.numel() for v in adapters.values())
    assert size == pytest.approx(os.path.getsize(plain[1]), rel=0.02, abs=1024 * len(adapters))


@CASES
def test_a_published_file_is_a_checkpoint_of_timm(cls_lab, runs, family, form, terms):
    """Whatever taught the student; timm reads tensors only."""
    runner, path = runs[0][family, form]
    (published,) = Path(runner.work_dir).glob('epoch_1-*.pth')
    assert set(read(published)) <= {'state_dict', 'meta', 'message_hub'}
    config = cls_lab.plain(family)
    options = {k: v for k, v in config.model.items() if k not in ('type', 'model', 'input_size')}
    options.update(dict(img_size=SIZE) if family == 'deit' else {})
    net = timm.create_model(config.model.model, checkpoint_path=str(published), **options)
    assert difference(net.state_dict(), read(path)['state_dict']) == {}


@pytest.mark.parametrize('family', ['resnet', 'deit'])
def test_adapters_are_saved_apart_with_their_statistics(runs, family):
    runner, path = runs[0][family, 'model_form']
    saved, own = read(path)['kd_plugins']['adapters'], adapters_of(runner)
    assert difference(saved, own) == {}
    (mean,) = [v for k, v in saved.items() if k.endswith('running_mean')]
    (batches,) = [v for k, v in saved.items() if k.endswith('num_batches_tracked')]
    assert mean.abs().sum() > 0 and batches == 4
    assert [k for k in saved if k.startswith('ofa.')]
    for model in (runner.model, ema(runner)):
        assert not [k for k in model.state_dict() if k.split('.')[0] in ('features', 'ofa', 'mgd', 'kd_adapters')]


def test_the_teacher_stays_as_its_file_says(cls_lab, runs):
    found, prints = runs
    assert len(prints) == 16 and len(set(prints)) == 1
    stored = read(cls_lab.teacher()['checkpoint'])['state_dict']
    for (_, form), (runner, _) in found.items():
        if form != 'plain':
            model = distill_hook(runner).session.teacher.model
            assert difference(stored, model.state_dict()) == {}
            assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@CASES
def test_load_from_starts_at_the_checkpoints_weights(cls_lab, runs, family, form, terms):
    """Of a plain run or a distilled one, EMA copy included; and distillation goes on from there."""
    for source in ('plain', 'model_form'):
        path = runs[0][family, source][1]
        config = cls_lab.plain(family, load_from=path, extra=DETERMINISTIC, optim_wrapper__optimizer__lr=0.0)
        runner, logs = train(cls_lab, distilled(cls_lab, config, form, terms))
        assert all(is_on(log, terms) for log in logs)
        start, state, averaged = (
            {k: v for k, v in found.items() if not k.endswith(('running_mean', 'running_var', 'num_batches_tracked'))}
            for found in (read(path)['state_dict'], runner.model.state_dict(), ema(runner).module.state_dict())
        )
        assert difference(start, state) == {}
        assert max(difference(start, averaged).values(), default=0) < 1e-6


# ---------------------------------------------------------------------- resume
def test_the_framework_itself_resumes_exactly(cls_lab):
    """The measure for the next test: MMEngine restores weights, momentum, EMA and the order of the images."""
    config = cls_lab.plain('deit', extra=DETERMINISTIC, train_cfg__max_epochs=3, **SHORT)
    config.default_hooks.checkpoint.interval = 1
    whole, logs = train(cls_lab, config)
    again, later = train(cls_lab, interrupted(cls_lab, config, 4))
    assert later == logs[2:]
    assert difference(weights(whole), weights(again)) == {}


def test_resume_after_sigkill_equals_the_uninterrupted_run(cls_lab):
    """Adapters and their statistics, the place on the ramp, the heads' teachers, and ``stop``."""
    ramp = dict(type='linear', start=0.5, end=2.0)
    terms = {name: {**term, 'weight': ramp} for name, term in TOKEN_MODEL[1].items()}
    config = cls_lab.plain('deit', extra=DETERMINISTIC, train_cfg__max_epochs=4, **SHORT)
    config.default_hooks.checkpoint.interval = 1
    config = cls_lab.model_form(config, cls_lab.teacher(), terms, start=1, stop=3)
    whole, logs = train(cls_lab, config)
    assert [is_on(log, terms) for log in logs] == [False] * 2 + [True] * 4 + [False] * 2

    config.work_dir += '_killed'
    config.custom_imports = dict(imports=['tests.integration.child_hooks'], allow_failed_imports=False)
    killed = copy.deepcopy(config)
    killed.custom_hooks.append(dict(type='KillAt', iteration=5))
    died = cls_lab.run('tools/train.py', cls_lab.dump(killed), check=False)
    assert died.returncode == -signal.SIGKILL, died.stdout[-2000:]
    assert sorted(f for f in os.listdir(config.work_dir) if f.endswith('.pth')) == ['epoch_1.pth', 'epoch_2.pth']

    again, later = train(cls_lab, resumed(config))
    assert later == logs[4:]
    assert difference(adapters_of(whole), adapters_of(again)) == {}
    assert difference(weights(whole), weights(again)) == {}


def test_a_resumed_run_of_weight_zero_is_the_resumed_plain_run(cls_lab):
    """What is random restarts from the seed on resume; distillation does not move it."""
    states, losses = [], []
    for form in (None, TOKEN_HOOK, TOKEN_MODEL):
        config = cls_lab.plain('deit', extra=AUGMENTED, train_cfg__max_epochs=2, **SHORT)
        config.default_hooks.checkpoint.interval = 1
        if form is not None:
            config = distilled(cls_lab, config, form[0], zero(form[1]))
        again, logs = train(cls_lab, interrupted(cls_lab, config, 3))
        assert len(logs) == 2
        states.append(weights(again))
        losses.append([own_losses(log) for log in logs])
    assert losses[0] == losses[1] == losses[2]
    assert difference(states[0], states[1]) == {}
    assert difference(states[0], states[2]) == {}


# ---------------------------------------------------------------------- two processes
@pytest.fixture(scope='module')
def ranks(cls_lab):
    """What both ranks of a run wrote and printed: a token, a normalised adapter, a projector, and a partial teacher.

    It knows two of the four classes, so that for some batches there is nothing to teach, on one rank alone as well.
    """
    out = os.path.join(cls_lab.root, 'rank')
    config = cls_lab.plain('deit', train_cfg__max_epochs=3, train_dataloader__batch_size=2)
    config.custom_imports = dict(imports=['tests.integration.child_hooks'], allow_failed_imports=False)
    config.custom_hooks.append(dict(type='Dump', path=out))
    # MMEngine's default, but for the GPU that it names.
    config.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel', find_unused_parameters=False, broadcast_buffers=False, device_ids=None
    )
    teacher = {**cls_lab.teacher(classes=5), 'classes': ('square', 'star', 'moon', 'bar', 'sun')}
    config = cls_lab.model_form(config, teacher, TOKEN_MODEL[1], start=1, stop=2)
    launch = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone']
    done = cls_lab.run(
        *launch, 'tools/train.py', cls_lab.dump(config), '--launcher', 'pytorch', CUDA_VISIBLE_DEVICES=''
    )
    return read(out + '0'), read(out + '1'), done.stdout


ON = [False] * 4 + [True] * 4 + [False] * 4


def test_two_processes_run_through_start_and_stop(ranks):
    """Without unused-parameter errors where adapters are idle or the token's teacher changes."""
    first, second, printed = ranks
    idle = []
    for rank in (first, second):
        assert rank['wrapper'] == 'MMDistributedDataParallel'
        assert [is_on(log, ['features']) for log in rank['logs']] == ON
        idle.append([log['loss_kd_token'] == 0 for log in rank['logs'][4:8]])
        assert not any(log['loss_kd_token'] or log['loss_kd_ofa'] for log in rank['logs'][:4] + rank['logs'][8:])
    assert not all(idle[0] + idle[1]) and idle[0] != idle[1], 'both ranks had images of known classes alike'
    assert first['logs'] != second['logs'], 'both ranks saw the same images'
    assert printed.count('Knowledge distillation is ON') == 1


def test_two_processes_hold_equal_weights(ranks):
    """All that is trained; statistics of BatchNorm are those of a rank's own images."""

    def trained(state):
        return {k: v for k, v in state.items() if 'running_' not in k}

    first, second = ranks[:2]
    for entry in ('weights', 'adapters'):
        assert difference(trained(first[entry]), trained(second[entry])) == {}
    for gradients, others, on in zip(first['gradients'], second['gradients'], ON, strict=True):
        assert difference(gradients, others) == {}
        assert len([k for k in gradients if k.startswith('net.')]) == len(
            [k for k in first['weights'] if k.startswith('student.')]
        )
        assert gradients['net.head.weight'].any() and gradients['net.head_dist.weight'].any()
        adapters = {k: v for k, v in gradients.items() if k.startswith('kd_adapters')}
        assert {k.split('.')[1] for k in adapters} == ({'features', 'ofa'} if on else set())
        assert any(v.any() for v in adapters.values()) == on


# ---------------------------------------------------------------------- what else a run can switch on
@BOTH
def test_bf16_autocast(cls_lab, family, form, terms):
    """KD losses of a bf16 run are those of the float32 run within bf16's precision, and reach the student."""
    logs = {}
    for name, wrapper, chosen in (
        ('full', 'OptimWrapper', terms),
        ('half', 'Bf16OptimWrapper', terms),
        ('silent', 'Bf16OptimWrapper', zero(terms)),
    ):
        config = cls_lab.plain(family, optim_wrapper__type=wrapper)
        runner, logs[name] = train(cls_lab, distilled(cls_lab, config, form, chosen))
    for key in (f'loss_kd_{name}' for name in terms):
        assert logs['half'][0][key] == pytest.approx(logs['full'][0][key], rel=0.05)
        assert any(torch.tensor(log[key]).bfloat16().item() != log[key] for log in logs['half']), 'computed in bf16'
    assert all(p.dtype == torch.float32 for p in runner.model.parameters())
    assert own_losses(logs['half'][-1]) != own_losses(logs['silent'][-1])


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_gradient_accumulation_equals_the_large_batch(cls_lab, form):
    """Two batches of four accumulated are one of eight, for losses that are means over the images."""
    terms, states = dict(token=TOKEN, logits=LOGITS), []
    if form == 'model_form':
        terms.update(features=FEATURES, ofa=PROJECTED)
    for batch, counts in ((8, 1), (4, 2)):
        config = cls_lab.plain(
            'deit',
            steps=2 * counts,
            extra=DETERMINISTIC,
            train_dataloader__batch_size=batch,
            optim_wrapper__accumulative_counts=counts,
            param_scheduler=[],
        )
        config.train_dataloader.sampler.shuffle = False
        config.custom_hooks = []
        runner, logs = train(cls_lab, distilled(cls_lab, config, form, terms))
        assert len(logs) == 2 * counts and all(is_on(log, terms) for log in logs)
        states.append({**runner.model.state_dict(), **adapters_of(runner)})
    initial = cls_lab.build(config).state_dict()
    assert max(difference(initial, {k: states[0][k] for k in initial}).values()) > 1e-4
    assert max(difference(*states).values(), default=0) < 1e-6


class Recompute(Probe):
    """Counts the runs of a module in training; ``timms_own`` switches timm's checkpointing on."""

    def __init__(self, module, timms_own):
        super().__init__(lambda runner: self.after.append(self.ran))
        self.module, self.timms_own, self.ran, self.after = module, timms_own, 0, []

    def before_train(self, runner):
        if self.timms_own:
            runner.model.net.set_grad_checkpointing()
        runner.model.get_submodule(self.module).register_forward_hook(self.count)

    def count(self, *_):
        self.ran += 1


@pytest.mark.parametrize('how', ['activation_checkpointing', 'set_grad_checkpointing'])
@pytest.mark.parametrize(
    ('family', 'block', 'inner'),
    [('deit', 'net.blocks.2', 'norm1'), ('convnext', 'net.stages.2', 'blocks.0.norm')],
    ids=['deit', 'convnext'],
)
@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad', 'ignore:torch.utils.checkpoint')
def test_activation_checkpointing(cls_lab, family, block, inner, how):
    """MMEngine's and timm's: what is recomputed changes neither losses nor weights, random depth included."""
    # At the checkpointed module itself: a tap has to keep what MMEngine has set there.
    terms = dict(features={**FEATURES, 'student': block}, ofa=PROJECTED, logits=LOGITS)
    if family == 'deit':
        terms['token'] = TOKEN
    states, watches = [], []
    for mmengines, timms_own in ((False, False), (how == 'activation_checkpointing', how == 'set_grad_checkpointing')):
        options = dict(activation_checkpointing=[block]) if mmengines else {}
        config = cls_lab.plain(family, extra='model.update(drop_path_rate=0.2)\n', **options)
        watches.append(Recompute(f'{block}.{inner}', timms_own))
        runner = cls_lab.train(cls_lab.model_form(config, cls_lab.teacher(), terms), watches[-1])
        states.append(weights(runner))
        left = [n for n, m in runner.model.named_modules() if 'forward' in m.__dict__]
        assert left == ([block] if mmengines else [])
    for ours, theirs in zip(watches[0].logs, watches[1].logs, strict=True):
        assert is_on(ours, terms)
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert max(difference(*states).values(), default=0) < 1e-6
    first, again = (watch.after for watch in watches)
    assert [a - b for a, b in zip(first[1:], first, strict=False)] == [1, 1, 1]
    assert [a - b for a, b in zip(again[1:], again, strict=False)] == [2, 2, 2], 'nothing was recomputed'


@pytest.mark.parametrize('how', ['freeze', 'activation_checkpointing'])
@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad', 'ignore:torch.utils.checkpoint')
def test_a_tap_without_gradient_is_refused_before_the_run(cls_lab, how):
    """Not in the iteration in which KD starts, which may be hours later."""
    frozen = dict(model__freeze=['conv1', 'bn1', 'layer1'])
    recomputed = dict(activation_checkpointing=['net.layer1'])
    config = cls_lab.plain(train_cfg__max_epochs=2, **(frozen if how == 'freeze' else recomputed))
    term = dict(loss=dict(type='AttentionTransferLoss'), student='net.layer1.0.conv1', teacher='net.layer1')
    logs = Probe()
    with pytest.raises(DistillError, match='carries no gradient'):
        cls_lab.train(cls_lab.hook_form(config, cls_lab.teacher(), dict(at=term), start=1), logs)
    assert not logs.logs


@BOTH
def test_paramwise_options_stay_the_students(cls_lab, family, form, terms):
    """A tenfold rate for classifiers, no decay for norms and biases; adapters have the defaults."""
    head = 'net.fc' if family == 'resnet' else 'net.head'
    rules = dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={head: dict(lr_mult=10.0)})
    config = cls_lab.plain(family, steps=1, optim_wrapper__paramwise_cfg=rules, param_scheduler=[])

    adapters = []

    def rates(cfg):
        runner, _ = train(cls_lab, cfg, lambda runner: adapters.append(adapter_rates(runner)))
        names = {id(p): n for n, p in runner.model.named_parameters()}
        groups = runner.optim_wrapper.param_groups
        return {names[id(p)]: (g['lr'], g['weight_decay']) for g in groups for p in g['params'] if id(p) in names}

    theirs, ours = rates(config), rates(distilled(cls_lab, config, form, terms))
    assert {rate for rate, _ in theirs.values()} == {0.01, 0.1} and 0.0 in {decay for _, decay in theirs.values()}
    assert ours == theirs
    assert adapters[-1] == ([0.01] if form == 'model_form' else [])


@pytest.mark.slow
def test_compiled_training_equals_eager_training(cls_lab):
    """From before ``start`` to after ``stop``, where what is compiled changes."""
    (form, terms), logs = TOKEN_MODEL, []
    for options in ({}, dict(compile=dict(backend='eager'))):
        torch._dynamo.reset()
        config = cls_lab.plain('deit', model__depth=2, extra=DETERMINISTIC, train_cfg__max_epochs=3, **SHORT, **options)
        logs.append(train(cls_lab, distilled(cls_lab, config, form, terms, start=1, stop=2))[1])
    torch._dynamo.reset()
    assert [is_on(log, terms) for log in logs[1]] == [False, False, True, True, False, False]
    for compiled, eager in zip(logs[1], logs[0], strict=True):
        assert compiled == pytest.approx(eager, rel=1e-4)


@BOTH
def test_validation_in_training_never_runs_the_teacher(cls_lab, family, form, terms, taught):
    validated, tapped = [], {True: 0, False: 0}

    class Watch(Probe):
        def before_train(self, runner):
            def count(net, args):
                tapped[net.training] += any('forward' in m.__dict__ for m in runner.model.modules())

            runner.model.net.register_forward_pre_hook(count)

        def before_val_epoch(self, runner):
            self.before = len(taught)

        def after_val_epoch(self, runner, metrics=None):
            assert len(taught) == self.before and distill_hook(runner)._capture is None
            assert not runner.model.separate_heads
            validated.append(metrics['accuracy/top1'])

    config = cls_lab.plain(family, val=True, train_cfg__max_epochs=2, train_cfg__val_interval=1, **SHORT)
    cls_lab.train(distilled(cls_lab, config, form, terms), Watch())
    assert len(validated) == 2 and tapped == {True: 4, False: 0}
    # The teacher that adapters are built for is not the one that teaches: two dry runs.
    assert len(taught) == 4 + 1


# ---------------------------------------------------------------------- the commands
# Recipes for classifiers, and whom they teach.
RECIPES = dict(
    kl='resnet',
    dkd='resnet',
    dist='resnet',
    deit_soft='deit',
    deit_hard='deit',
    deit_token='deit',
    deit_token_soft='deit',
    vit_feature='resnet',
    vit_attention='resnet',
    ofa='resnet',
)


@pytest.fixture
def command(monkeypatch):
    """Runs what ``tools/train.py`` or ``tools/test.py`` does; the runner, and the metrics of a test."""
    runners = []
    inner = cli._runner
    monkeypatch.setattr(cli, '_runner', lambda cfg: runners.append(inner(cfg)) or runners[-1])

    def run(function, *arguments):
        runners.clear()
        metrics = function([str(a) for a in arguments])
        return (runners[0], metrics) if function is cli.test else runners[0]

    return run


def trained(config):
    """Arguments of a test of what a config's run saved, under a name of its own."""
    options = ['--cfg-options', f'experiment_name={config.experiment_name}_test']
    return os.path.join(config.work_dir, 'epoch_1.pth'), '--work-dir', config.work_dir + '_test', *options


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipes(cls_lab, recipe, command):
    """``tools/train.py --kd`` on a plain config, and ``tools/test.py`` on what it saved, the teacher's files gone."""
    config = cls_lab.plain(RECIPES[recipe], val=True)
    # Of its own, to be deleted; vit_attention names the last of twelve blocks.
    family, more = ('vit', "model['depth'] = 12\n") if recipe.startswith('vit') else ('resnet', '')
    teacher = cls_lab.teacher(family, extra=f'{more}notes = {recipe!r}\n')
    path = cls_lab.dump(config)
    before = Path(path).read_text()
    runner = command(
        cli.train, path, '--kd', recipe, '--teacher', teacher['config'], '--teacher-checkpoint', teacher['checkpoint']
    )
    terms = distill_hook(runner).session.terms
    assert {f'loss_kd_{name}' for name in terms} | {'kd_ratio'} <= logged(runner)
    assert all(runner.message_hub.get_scalar(f'train/loss_kd_{name}').current() > 0 for name in terms)
    assert type(runner.model).__name__ == 'TimmClassifier'
    assert Path(path).read_text() == before
    for file in teacher.values():
        os.remove(file)
    tested, metrics = command(cli.test, path, *trained(config))
    assert 0 <= metrics['accuracy/top1'] <= metrics['accuracy/top3'] <= 100
    assert ('accuracy/top1_distillation_head' in metrics) == (RECIPES[recipe] == 'deit')
    assert difference(read(trained(config)[0])['state_dict'], tested.model.state_dict()) == {}


@BOTH
def test_a_distilled_config_is_tested_without_its_teacher(cls_lab, family, form, terms, command):
    teacher = cls_lab.teacher(extra=f'notes = {family + form!r}\n')  # of its own, to be deleted
    config = distilled(cls_lab, cls_lab.plain(family, val=True), form, terms, teacher=teacher)
    path = cls_lab.dump(config)
    command(cli.train, path)
    for file in teacher.values():
        os.remove(file)
    tested, metrics = command(cli.test, path, *trained(config))
    assert type(tested.model).__name__ == 'TimmClassifier' and 'accuracy/top1' in metrics
    assert difference(read(trained(config)[0])['state_dict'], tested.model.state_dict()) == {}
    # MMEngine's own way, in which the model is built as the config says.
    config.load_from, config.experiment_name = trained(config)[0], config.experiment_name + '_own'
    assert cls_lab.runner(config).test() == metrics


def test_distilling_an_unedited_config_from_the_command_line(cls_lab, command):
    teacher = cls_lab.teacher()
    options = {
        'type': 'kd_plugins.DistillHook',
        'teacher.config': teacher['config'],
        'teacher.checkpoint': teacher['checkpoint'],
        'alpha': 0.5,
        'terms.token.loss.type': 'KLDivLoss',
        'terms.token.loss.temperature': 3.0,
        'terms.token.student': 'dist_logits',
        'terms.token.teacher': 'logits',
    }
    path = cls_lab.dump(cls_lab.plain('deit'))
    runner = command(cli.train, path, '--cfg-options', *(f'default_hooks.distill.{k}={v}' for k, v in options.items()))
    assert {'loss_kd_token', 'kd_ratio'} <= logged(runner)
    assert distill_hook(runner).session.terms['token'].loss.temperature == 3.0


class Small(nn.Sequential):
    """A network that can be exported in no time; 4 classes."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(CLASSES))
        )


def foreign_teacher(kind, folder):
    """What ``--teacher`` and ``--teacher-checkpoint`` are for a teacher that is no config."""
    torch.manual_seed(1)
    if kind == 'pt2':
        batch = torch.export.Dim('batch', min=1, max=64)
        example = (torch.randn(2, 3, SIZE, SIZE),)
        program = torch.export.export(Small().eval(), example, dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / 'teacher.pt2')
        return [folder / 'teacher.pt2']
    if kind == 'torchscript':
        torch.jit.save(torch.jit.script(Small().eval()), folder / 'teacher.torchscript')
        return [folder / 'teacher.torchscript']
    if kind == 'timm':
        net = timm.create_model('test_resnet', num_classes=len(CLASSES))
    else:
        import torchvision

        net = torchvision.models.get_model('squeezenet1_1', weights=None, num_classes=len(CLASSES))
    torch.save(net.state_dict(), folder / 'teacher.pth')
    name = 'test_resnet' if kind == 'timm' else 'squeezenet1_1'
    return [f'{kind}::{name}', '--teacher-checkpoint', folder / 'teacher.pth']


@pytest.mark.parametrize('kind', ['timm', 'torchvision', 'pt2', 'torchscript'])
def test_teachers_of_other_kinds_from_the_command_line(cls_lab, kind, command, tmp_path):
    config = cls_lab.plain('deit', val=True)
    path = cls_lab.dump(config)
    runner = command(cli.train, path, '--kd', 'deit_token', '--teacher', *foreign_teacher(kind, tmp_path))
    assert runner.message_hub.get_scalar('train/loss_kd_token').current() > 0
    assert distill_hook(runner).session.teacher.num_classes == len(CLASSES)
    for file in tmp_path.iterdir():
        file.unlink()
    _, metrics = command(cli.test, path, *trained(config))
    assert 'accuracy/top1' in metrics


@BOTH
def test_a_teacher_of_other_classes(cls_lab, family, form, terms):
    """Adapters are built before the data set is known, hence before classes can be matched by name."""
    names = ('square', 'bar', 'star', 'circle', 'moon')
    teacher = {**cls_lab.teacher(classes=5), 'classes': names}
    config = cls_lab.plain(family, train_dataloader__batch_size=16)
    runner, logs = train(cls_lab, distilled(cls_lab, config, form, terms, teacher=teacher))
    assert all(is_on(log, terms) for log in logs)
    assert distill_hook(runner).session.classes == {'': ([0, 1, 3], [1, 3, 0])}
