"""What every distilled run promises, kept by segmentors in iteration-based runs."""

import copy
import os
import runpy
import signal
import sys
from pathlib import Path

import mmengine.runner.checkpoint as mm
import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.mm import cli
from kd_plugins.teachers.frozen import FrozenTeacher
from tests.integration import child_hooks  # noqa: F401  (registers KillAt and Dump)
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
from tests.integration.seg_lab import FEATURES, LOGITS

TOOLS = Path(mmseg.__file__).parent / '.mim' / 'tools'
NORMED = {**FEATURES, 'adapter': dict(type='auto', norm=True)}
CWD = {**LOGITS, 'loss': dict(type='ChannelWiseDivLoss')}
MGD = dict(loss=dict(type='MGDLoss'), student='backbone[3]', teacher='backbone[3]')
FORMS = dict(hook_form=dict(logits=LOGITS), model_form=dict(features=NORMED))

# Neither dropout nor flips, whose generators MMEngine does not restore.
DETERMINISTIC = """
for part in ('decode_head', 'auxiliary_head'):
    model[part]['dropout_ratio'] = 0.0
pipeline[2]['prob'] = 0.0
train_dataloader['dataset']['pipeline'][2]['prob'] = 0.0
del part
"""
# Results depend neither on how images are spread over batches nor on how often a forward is run.
GROUP_NORM = """
for part in ('backbone', 'decode_head', 'auxiliary_head'):
    model[part]['norm_cfg'] = dict(_delete_=True, type='GN', num_groups=2)
del part
"""


# ---------------------------------------------------------------------- weight 0, start, stop, schedules
@pytest.mark.parametrize(
    ('family', 'form', 'options'),
    [
        ('fcn', 'hook_form', {}),
        ('ocr', 'hook_form', {}),
        ('fcn', 'model_form', {}),
        ('segformer', 'model_form', dict(optim_wrapper__clip_grad=dict(max_norm=0.5))),
    ],
    ids=['hook', 'hook, cascade', 'model', 'model, clipped gradients'],
)
def test_weight_zero_equals_the_plain_run(seg_lab, family, form, options):
    """Bit for bit, with dropout in the student's head and an EMA copy."""
    config = seg_lab.plain(family, **options)
    one, plain = train(seg_lab, config)
    other, logs = train(seg_lab, getattr(seg_lab, form)(config, seg_lab.teacher(family), zero(FORMS[form])))
    assert [m for m in one.model.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d)) and m.p > 0]
    assert ema(other).steps == 4
    assert bool(adapters_of(other)) == (form == 'model_form')
    assert [own_losses(log) for log in logs] == plain and len(plain) == 4
    assert difference(weights(one), weights(other)) == {}


@pytest.fixture
def taught(monkeypatch):
    """Counts the teacher's runs."""
    calls = []
    inner = FrozenTeacher.outputs
    monkeypatch.setattr(FrozenTeacher, 'outputs', lambda self, *args: calls.append(1) or inner(self, *args))
    return calls


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_start_and_stop_count_iterations(seg_lab, form, taught):
    """KD is on from ``start`` to before ``stop``, the run is the plain one before, and the teacher rests outside."""
    config, terms = seg_lab.plain(steps=6), FORMS[form]
    seen, ran = [], []

    def keep(runner):
        seen[-1].append(weights(runner))
        ran.append(len(taught))

    for cfg in (config, getattr(seg_lab, form)(config, seg_lab.teacher(), terms, start=2, stop=4)):
        seen.append([])
        ran.clear()
        _, logs = train(seg_lab, cfg, keep)
    plain, distilled = seen
    assert [is_on(log, terms) for log in logs] == [False, False, True, True, False, False]
    assert [log['kd_ratio'] > 0 for log in logs] == [False, False, True, True, False, False]
    for step in (0, 1):
        assert difference(plain[step], distilled[step]) == {}, step
    assert difference(plain[2], distilled[2]), 'distillation never started'
    dry_runs = ran[0]
    assert [n - dry_runs for n in ran] == [0, 0, 1, 2, 2, 2]


def test_a_ramp_follows_the_iterations_of_the_run(seg_lab):
    """At learning rate 0 nothing but the weight differs between two runs, to the last digit of what is logged."""
    config = seg_lab.plain(optim_wrapper__optimizer__lr=0.0)
    logs = {}
    for name, weight in (('constant', 1.0), ('ramp', dict(type='linear', start=0.5, end=2.5))):
        terms = dict(logits={**LOGITS, 'weight': weight})
        _, logs[name] = train(seg_lab, seg_lab.hook_form(config, seg_lab.teacher(), terms))
    for weight, ramp, constant in zip((0.5, 1.0, 1.5, 2.0), logs['ramp'], logs['constant'], strict=True):
        assert constant['loss_kd_logits'] > 0
        assert ramp['loss_kd_logits'] == pytest.approx(weight * constant['loss_kd_logits'], rel=1e-6)


# ---------------------------------------------------------------------- checkpoints and the teacher
@pytest.fixture(scope='module')
def runs(seg_lab):
    """A plain run and both forms: ``{form: (runner, path of its checkpoint)}``, and what the teacher was meanwhile."""
    config = seg_lab.plain()
    found, prints = {}, []

    def check(runner):
        teacher = distill_hook(runner).session.teacher
        assert runner.model.training and not [n for n, m in teacher.model.named_modules() if m.training]
        prints.append(teacher.fingerprint())

    for name in ('plain', *FORMS):
        cfg = config if name == 'plain' else getattr(seg_lab, name)(config, seg_lab.teacher(), FORMS[name])
        runner, _ = train(seg_lab, cfg, None if name == 'plain' else check)
        found[name] = runner, os.path.join(runner.work_dir, 'iter_4.pth')
    return found, prints


@pytest.mark.parametrize('form', FORMS)
def test_checkpoints_are_those_of_the_plain_student(seg_lab, runs, form):
    plain, (runner, path) = runs[0]['plain'], runs[0][form]
    theirs, ours = read(plain[1]), read(path)
    for entry in ('state_dict', 'ema_state_dict'):
        assert list(ours[entry]) == list(theirs[entry])
        assert [(v.shape, v.dtype) for v in ours[entry].values()] == [
            (v.shape, v.dtype) for v in theirs[entry].values()
        ]
    assert set(ours) - set(theirs) == ({'kd_plugins'} if form == 'model_form' else set())
    model = seg_lab.build(seg_lab.plain(), seed=3)
    mm.load_checkpoint(model, path, strict=True)  # raises on any missing or unexpected key
    averaged = {k.removeprefix('ema.module.'): v for k, v in weights(runner).items() if k.startswith('ema.module.')}
    assert difference(model.state_dict(), averaged) == {}
    size = os.path.getsize(path) - 2 * 4 * sum(
        v.numel() for v in ours.get('kd_plugins', {}).get('adapters', {}).values()
    )
    assert size == pytest.approx(os.path.getsize(plain[1]), rel=0.02)


def test_adapters_are_saved_apart_with_their_statistics(runs):
    runner, path = runs[0]['model_form']
    saved, own = read(path)['kd_plugins']['adapters'], adapters_of(runner)
    assert difference(saved, own) == {}
    (mean,) = [v for k, v in saved.items() if k.endswith('running_mean')]
    (batches,) = [v for k, v in saved.items() if k.endswith('num_batches_tracked')]
    assert mean.abs().sum() > 0 and batches == 4
    for model in (runner.model, ema(runner)):
        assert not [k for k in model.state_dict() if k.split('.')[0] in ('features', 'ofa', 'mgd', 'kd_adapters')]


def test_the_teacher_stays_as_its_file_says(seg_lab, runs):
    found, prints = runs
    assert len(prints) == 8 and len(set(prints)) == 1
    stored = read(seg_lab.teacher()['checkpoint'])['state_dict']
    for form in FORMS:
        model = distill_hook(found[form][0]).session.teacher.model
        assert difference(stored, model.state_dict()) == {}
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------- resume
def test_the_framework_itself_resumes_exactly(seg_lab):
    """The measure for the next test: MMEngine restores weights, momentum, EMA and the order of the images."""
    config = seg_lab.plain(steps=6, extra=DETERMINISTIC, default_hooks__checkpoint__interval=2)
    whole, logs = train(seg_lab, config)
    again, later = train(seg_lab, interrupted(seg_lab, config, 5))
    assert later == logs[4:]
    assert difference(weights(whole), weights(again)) == {}


def test_resume_after_sigkill_equals_the_uninterrupted_run(seg_lab):
    """Adapters and their statistics, the place on the ramp, and ``stop``."""
    ramp = dict(type='linear', start=0.5, end=2.0)
    terms = dict(features={**NORMED, 'weight': ramp}, logits={**LOGITS, 'weight': ramp})
    config = seg_lab.plain(steps=6, extra=DETERMINISTIC, default_hooks__checkpoint__interval=2)
    config = seg_lab.model_form(config, seg_lab.teacher(), terms, start=1, stop=5)
    whole, logs = train(seg_lab, config)
    assert [is_on(log, terms) for log in logs] == [False, True, True, True, True, False]

    config.work_dir += '_killed'
    config.custom_imports = dict(imports=['tests.integration.child_hooks'], allow_failed_imports=False)
    killed = copy.deepcopy(config)
    killed.custom_hooks.append(dict(type='KillAt', iteration=5))
    died = seg_lab.run('tools/train.py', seg_lab.dump(killed), check=False)
    assert died.returncode == -signal.SIGKILL, died.stdout[-2000:]
    assert sorted(f for f in os.listdir(config.work_dir) if f.endswith('.pth')) == ['iter_2.pth', 'iter_4.pth']

    again, later = train(seg_lab, resumed(config))
    assert later == logs[4:]
    assert difference(adapters_of(whole), adapters_of(again)) == {}
    assert difference(weights(whole), weights(again)) == {}


def test_a_resumed_run_of_weight_zero_is_the_resumed_plain_run(seg_lab):
    """Dropout and flips restart from the seed on resume; distillation does not move them."""
    states = []
    for form in (None, 'hook_form', 'model_form'):
        config = seg_lab.plain(default_hooks__checkpoint__interval=2)
        if form is not None:
            config = getattr(seg_lab, form)(config, seg_lab.teacher(), zero(FORMS[form]))
        again, logs = train(seg_lab, interrupted(seg_lab, config, 3))
        assert len(logs) == 2
        states.append(weights(again))
    assert difference(states[0], states[1]) == {}
    assert difference(states[0], states[2]) == {}


# ---------------------------------------------------------------------- two processes
@pytest.fixture(scope='module')
def ranks(seg_lab):
    """What both ranks of a run with a normalised adapter, a generator and logits wrote and printed."""
    out = os.path.join(seg_lab.root, 'rank')
    config = seg_lab.plain(train_dataloader__batch_size=2)
    config.custom_imports = dict(imports=['tests.integration.child_hooks'], allow_failed_imports=False)
    config.custom_hooks.append(dict(type='Dump', path=out))
    # MMEngine's default, but for the GPU that it names.
    config.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel', find_unused_parameters=False, broadcast_buffers=False, device_ids=None
    )
    terms = dict(features=NORMED, mgd=MGD, logits=LOGITS)
    config = seg_lab.model_form(config, seg_lab.teacher(), terms, start=1, stop=3)
    launch = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone']
    done = seg_lab.run(
        *launch, 'tools/train.py', seg_lab.dump(config), '--launcher', 'pytorch', CUDA_VISIBLE_DEVICES=''
    )
    return read(out + '0'), read(out + '1'), done.stdout, terms


def test_two_processes_run_through_start_and_stop(ranks):
    """Without unused-parameter errors where adapters and generator are idle."""
    zero_, one, printed, terms = ranks
    for rank in (zero_, one):
        assert rank['wrapper'] == 'MMDistributedDataParallel'
        assert [is_on(log, terms) for log in rank['logs']] == [False, True, True, False]
    assert zero_['logs'] != one['logs'], 'both ranks saw the same images'
    assert printed.count('Knowledge distillation is ON') == 1


def test_two_processes_hold_equal_weights(ranks):
    """All that is trained; statistics of BatchNorm are those of a rank's own images."""

    def trained(state):
        return {k: v for k, v in state.items() if 'running_' not in k}

    first, second = ranks[:2]
    for entry in ('weights', 'adapters'):
        assert difference(trained(first[entry]), trained(second[entry])) == {}
    assert [k for k in first['adapters'] if k.startswith('mgd.losses') and 'generator' in k]
    for gradients, others, on in zip(first['gradients'], second['gradients'], (False, True, True, False), strict=True):
        assert difference(gradients, others) == {}
        adapters = [v for k, v in gradients.items() if k.startswith('kd_adapters')]
        assert bool(adapters) == on and all(v.any() for v in adapters)


# ---------------------------------------------------------------------- what else a run can switch on
@pytest.mark.parametrize('form', FORMS)
def test_bf16_autocast(seg_lab, form):
    """KD losses of a bf16 run are those of the float32 run within bf16's precision, and reach the student."""
    terms, logs = FORMS[form], {}
    for name, wrapper, chosen in (
        ('full', 'OptimWrapper', terms),
        ('half', 'Bf16OptimWrapper', terms),
        ('silent', 'Bf16OptimWrapper', zero(terms)),
    ):
        config = getattr(seg_lab, form)(seg_lab.plain(optim_wrapper__type=wrapper), seg_lab.teacher(), chosen)
        runner, logs[name] = train(seg_lab, config)
    (key,) = [f'loss_kd_{name}' for name in terms]
    assert logs['half'][0][key] == pytest.approx(logs['full'][0][key], rel=0.05)
    assert any(torch.tensor(log[key]).bfloat16().item() != log[key] for log in logs['half']), 'computed in bf16'
    assert all(p.dtype == torch.float32 for p in runner.model.parameters())
    assert own_losses(logs['half'][-1]) != own_losses(logs['silent'][-1])


def test_gradient_accumulation_equals_the_large_batch(seg_lab):
    """Two batches of two accumulated are one of four, for losses that are means over the images."""
    terms, states = dict(features=FEATURES, cwd=CWD), []
    for batch, counts in ((4, 1), (2, 2)):
        config = seg_lab.plain(
            steps=2 * counts,
            extra=DETERMINISTIC + GROUP_NORM,
            train_dataloader__batch_size=batch,
            train_dataloader__sampler__shuffle=False,
            optim_wrapper__accumulative_counts=counts,
            param_scheduler=[],
        )
        config.custom_hooks = []
        runner, logs = train(seg_lab, seg_lab.model_form(config, seg_lab.teacher(), terms))
        assert all(is_on(log, terms) for log in logs)
        states.append({**runner.model.state_dict(), **adapters_of(runner)})
    initial = seg_lab.build(config).state_dict()
    assert max(difference(initial, {k: states[0][k] for k in initial}).values()) > 1e-4
    assert max(difference(*states).values(), default=0) < 1e-6


@pytest.mark.parametrize('how', ['with_cp', 'activation_checkpointing'])
@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad', 'ignore:torch.utils.checkpoint')
def test_activation_checkpointing(seg_lab, how):
    """mmseg's option of the backbone and MMEngine's: what is recomputed changes neither losses nor weights."""
    # At the checkpointed module itself: a tap has to keep what MMEngine has set there.
    layer = {**FEATURES, 'student': 'backbone.layer3', 'teacher': 'backbone.layer3'}
    terms, states, logs = dict(features=layer, logits=LOGITS), [], []
    for on in (False, True):
        config = seg_lab.plain(extra=GROUP_NORM)
        if on and how == 'with_cp':
            config.model.backbone.with_cp = True
        elif on:
            config.activation_checkpointing = ['backbone.layer3']
        runner, log = train(seg_lab, seg_lab.model_form(config, seg_lab.teacher(), terms))
        assert all(is_on(entry, terms) for entry in log)
        states.append(weights(runner))
        logs.append(log)
        left = [n for n, m in runner.model.named_modules() if 'forward' in m.__dict__]
        assert left == (['backbone.layer3'] if on and how != 'with_cp' else [])
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert max(difference(*states).values(), default=0) < 1e-6


@pytest.mark.parametrize('how', ['with_cp', 'frozen_stages'])
@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad', 'ignore:torch.utils.checkpoint')
def test_a_tap_without_gradient_is_refused_before_the_run(seg_lab, how):
    """Not in the iteration in which KD starts, which may be hours later."""
    config = seg_lab.plain(**{f'model__backbone__{how}': 4 if how == 'frozen_stages' else True})
    term = dict(loss=dict(type='AttentionTransferLoss'), student='backbone.layer3.0.conv1', teacher='backbone.layer3')
    logs = Probe()
    with pytest.raises(DistillError, match='carries no gradient'):
        seg_lab.train(seg_lab.hook_form(config, seg_lab.teacher(), dict(at=term), start=3), logs)
    assert not logs.logs


@pytest.mark.parametrize('form', FORMS)
def test_paramwise_options_stay_the_students(seg_lab, form):
    """mmseg's usual tenfold rate for heads; adapters have the defaults."""
    rules = dict(norm_decay_mult=0, custom_keys={'head': dict(lr_mult=10.0)})
    config = seg_lab.plain(steps=1, optim_wrapper__paramwise_cfg=rules, param_scheduler=[])

    adapters = []

    def rates(cfg):
        runner, _ = train(seg_lab, cfg, lambda runner: adapters.append(adapter_rates(runner)))
        names = {id(p): n for n, p in runner.model.named_parameters()}
        groups = runner.optim_wrapper.param_groups
        return {names[id(p)]: (g['lr'], g['weight_decay']) for g in groups for p in g['params'] if id(p) in names}

    theirs, ours = rates(config), rates(getattr(seg_lab, form)(config, seg_lab.teacher(), FORMS[form]))
    assert {rate for rate, _ in theirs.values()} == {0.01, 0.1}
    assert ours == theirs
    assert adapters[-1] == ([0.01] if form == 'model_form' else [])


@pytest.mark.slow
def test_compiled_training_equals_eager_training(seg_lab):
    terms, logs = dict(features=NORMED, logits=LOGITS), []
    for options in ({}, dict(compile=dict(backend='eager'))):
        torch._dynamo.reset()
        config = seg_lab.model_form(seg_lab.plain(steps=2, **options), seg_lab.teacher(), terms)
        logs.append(train(seg_lab, config)[1])
    torch._dynamo.reset()
    for compiled, eager in zip(logs[1], logs[0], strict=True):
        assert is_on(compiled, terms)
        assert compiled == pytest.approx(eager, rel=1e-4)


@pytest.mark.parametrize('form', FORMS)
def test_validation_in_training_never_runs_the_teacher(seg_lab, form, taught):
    validated, tapped = [], {True: 0, False: 0}

    class Watch(Probe):
        def before_train(self, runner):
            def count(backbone, args):
                tapped[backbone.training] += any('forward' in m.__dict__ for m in runner.model.modules())

            runner.model.backbone.register_forward_pre_hook(count)

        def before_val_epoch(self, runner):
            self.before = len(taught)

        def after_val_epoch(self, runner, metrics=None):
            assert len(taught) == self.before and distill_hook(runner)._capture is None
            validated.append(metrics['mIoU'])

    config = seg_lab.plain(val=True, train_cfg__val_interval=2)
    seg_lab.train(getattr(seg_lab, form)(config, seg_lab.teacher(), FORMS[form]), Watch())
    assert len(validated) == 2 and tapped == {True: 4, False: 0}
    # The teacher that adapters are built for is not the one that teaches: two dry runs.
    assert len(taught) == 4 + 1


# ---------------------------------------------------------------------- the commands
@pytest.fixture
def command(monkeypatch):
    """Runs a script of mmseg's own in this process and returns the runner that it made."""
    runners = []
    for name in ('train', 'test'):
        inner = getattr(Runner, name)
        monkeypatch.setattr(Runner, name, lambda self, inner=inner: runners.append(self) or inner(self))

    def run(script, *arguments):
        runners.clear()
        monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
        runpy.run_path(str(TOOLS / script), run_name='__main__')
        return runners[0]

    return run


@pytest.mark.parametrize('form', FORMS)
def test_mmsegs_own_scripts_train_and_test_the_distilled_config(seg_lab, form, command):
    """The test runs without the teacher's files, evaluates the checkpoint's weights, and can augment."""
    teacher = seg_lab.teacher(extra=f'\nnotes = {form!r}\n')  # of its own, to be deleted
    config = getattr(seg_lab, form)(seg_lab.plain(val=True), teacher, FORMS[form])
    # mmseg's tta_pipeline with one size instead of six.
    config.tta_pipeline[1].transforms[0] = [dict(type='Resize', scale_factor=1.5, keep_ratio=True)]
    path, work = seg_lab.dump(config), config.work_dir
    trained = command('train.py', path, '--work-dir', work)
    assert {f'loss_kd_{name}' for name in FORMS[form]} <= logged(trained)
    for file in teacher.values():
        os.remove(file)
    checkpoint = os.path.join(work, 'iter_4.pth')
    tested = command('test.py', path, checkpoint, '--work-dir', work + '_test')
    assert 'test/mIoU' in tested.message_hub.log_scalars
    assert difference(read(checkpoint)['state_dict'], tested.model.state_dict()) == {}
    assert len(list(tested.model.parameters())) == len(list(seg_lab.build(seg_lab.plain()).parameters()))
    augmented = command('test.py', path, checkpoint, '--tta', '--work-dir', work + '_tta')
    assert type(augmented.model).__name__ == 'SegTTAModel'
    assert 'test/mIoU' in augmented.message_hub.log_scalars
    assert difference(read(checkpoint)['state_dict'], augmented.model.module.state_dict()) == {}


def test_mmsegs_own_script_distils_an_unedited_config_from_the_command_line(seg_lab, command):
    teacher = seg_lab.teacher()
    options = {
        'type': 'kd_plugins.DistillHook',
        'teacher.config': teacher['config'],
        'teacher.checkpoint': teacher['checkpoint'],
        'terms.logits.loss.type': 'PixelwiseKLDivLoss',
        'terms.logits.student': 'decode_head',
        'terms.logits.teacher': 'decode_head',
    }
    path = seg_lab.dump(Config(seg_lab.plain().to_dict()))
    changes = [f'default_hooks.distill.{k}={v}' for k, v in options.items()]
    runner = command('train.py', path, '--cfg-options', *changes)
    assert {'loss_kd_logits', 'kd_ratio'} <= logged(runner)


@pytest.mark.parametrize('recipe', ['pixel_kl', 'cwd'])
def test_our_scripts_with_a_recipe(seg_lab, recipe, monkeypatch):
    """``tools/train.py --kd`` on a plain config, and ``tools/test.py`` on what it saved."""
    runners = []
    inner = cli._runner
    monkeypatch.setattr(cli, '_runner', lambda cfg: runners.append(inner(cfg)) or runners[-1])
    config, teacher = seg_lab.plain(val=True), seg_lab.teacher()
    path = seg_lab.dump(config)
    before = Path(path).read_text()
    kd = ['--kd', recipe, '--teacher', teacher['config'], '--teacher-checkpoint', teacher['checkpoint']]
    cli.train([path, *kd])
    assert type(runners[0].model).__name__ == 'EncoderDecoder', 'no adapter is needed, hence the hook form'
    assert {'loss_kd_logits', 'kd_ratio'} <= logged(runners[0])
    assert Path(path).read_text() == before
    checkpoint = os.path.join(config.work_dir, 'iter_4.pth')
    metrics = cli.test([path, checkpoint, '--work-dir', config.work_dir + '_test'])
    assert 0 <= metrics['mIoU'] <= 100
    assert difference(read(checkpoint)['state_dict'], runners[1].model.state_dict()) == {}


def test_a_teacher_of_other_classes_in_the_model_form(seg_lab):
    """Adapters are built before the data set is known, hence before classes can be matched by name."""
    names = ('sky', 'bar', 'tree', 'ground', 'circle')
    teacher = {**seg_lab.teacher(classes=5), 'classes': names}
    terms = dict(features=FEATURES, logits=LOGITS, cwd=CWD)
    runner, logs = train(seg_lab, seg_lab.model_form(seg_lab.plain(), teacher, terms))
    assert all(is_on(log, terms) for log in logs)
    assert distill_hook(runner).session.classes == {'': ([0, 1, 3], [3, 4, 1])}


def test_features_need_no_common_classes(seg_lab):
    """A backbone that was trained on other classes can teach one."""
    runner, logs = train(seg_lab, seg_lab.model_form(seg_lab.plain(), seg_lab.teacher(classes=7)))
    assert all(is_on(log, ['features']) for log in logs)
    assert distill_hook(runner).session.classes == {'': None}
