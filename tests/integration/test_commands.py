"""Requirement 9: the commands, ours and mmdet's own."""

import os
import runpy
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.runner import Runner

from kd_plugins.errors import DistillError
from kd_plugins.mm import cli
from kd_plugins.mm.configs import remove_distillation
from tests.integration.lab import LOGITS, Config

MMDET_TRAIN = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py'


def logged(runner):
    """Names of what was logged."""
    return {k.removeprefix('train/') for k in runner.message_hub.log_scalars}


def kd(teacher, recipe):
    return ['--kd', recipe, '--teacher', teacher['config'], '--teacher-checkpoint', teacher['checkpoint']]


@pytest.mark.parametrize(
    ('recipe', 'family', 'width', 'trained'),
    [
        ('yolo_logit', 'yolox', 8, False),
        ('localization', 'gfl', 8, False),
        ('feature', 'yolox', 8, True),  # other widths: trainable adapters
        ('feature', 'yolox', 4, False),
        ('cwd', 'yolox', 8, True),
        ('pkd', 'yolox', 4, False),
        ('cosine', 'yolox', 4, False),
        ('mgd', 'yolox', 4, True),  # its generator is trained, whatever the widths
    ],
)
def test_kd_option_distils_a_plain_config(lab, runners, recipe, family, width, trained):
    config = lab.plain(family)
    before = Path(path := lab.dump(config)).read_text()
    options = ['train_dataloader.batch_size=4', 'default_hooks.logger.interval=1']
    cli.train([path, *kd(lab.teacher(family, width), recipe), '--seed', '11', '--cfg-options', *options])
    (runner,) = runners
    assert type(runner.model) is type(lab.build(config)), 'the model keeps its class'
    assert runner.seed == 11
    assert runner.max_iters == 2, '--cfg-options was ignored'
    assert [k for k in logged(runner) if k.startswith('loss_kd_')]
    assert Path(path).read_text() == before
    saved = torch.load(os.path.join(runner.work_dir, 'epoch_1.pth'), weights_only=False)
    assert set(saved['state_dict']) == set(lab.build(config).state_dict())
    assert ('kd_plugins' in saved) == trained


def test_resume_and_amp_options(lab, runners, monkeypatch):
    config = lab.plain(default_hooks__checkpoint__interval=1)
    path = lab.dump(config)
    command = [path, *kd(lab.teacher(), 'feature')]
    cli.train(command)
    # MMEngine has mixed precision with loss scaling on accelerators only; --amp must at least ask for it.
    asked = {}
    monkeypatch.setattr(cli, '_runner', lambda cfg: asked.update(cfg.optim_wrapper) or Runner.from_cfg(cfg))
    if torch.cuda.is_available():
        cli.train([*command, '--amp'])
    else:
        with pytest.raises(AssertionError, match='only available'):
            cli.train([*command, '--amp', '--cfg-options', 'optim_wrapper.dtype=float16'])
    assert asked['type'] == 'AmpOptimWrapper' and asked['loss_scale'] == 'dynamic'
    monkeypatch.setattr(cli, '_runner', Runner.from_cfg)
    cli.train([*command, '--resume', '--cfg-options', 'train_cfg.max_epochs=2'])
    first, last = runners[0], runners[-1]
    assert (first.iter, last.iter, last.train_loop.epoch) == (4, 8, 2)
    logs = last.message_hub.get_scalar('train/loss_kd_neck').data[0]
    assert len(logs) == 8, 'the history of the first epoch was not resumed'


def test_the_scripts_run_as_processes_and_end_with_one_sentence(lab):
    """``tools/train.py`` from another folder, and its answer to a mistake."""
    config = lab.plain()
    path = lab.dump(config)
    wrong = lab.run(
        cli_path('train.py'),
        path,
        *kd({**lab.teacher(), 'checkpoint': 'yolox_l.pth'}, 'yolo_logit'),
        cwd=lab.root,
        check=False,
    )
    assert wrong.returncode == 1
    assert wrong.stdout.strip().splitlines()[-1].startswith("error: teacher.checkpoint 'yolox_l.pth' does not exist")
    assert 'Traceback' not in wrong.stdout


def cli_path(name):
    return str(Path(__file__).resolve().parents[2] / 'tools' / name)


def test_mmdets_own_train_script_distils_from_the_command_line(lab):
    """The stock script and an unedited config; nothing but ``--cfg-options`` brings distillation in."""
    teacher = lab.teacher()
    options = {
        'type': 'kd_plugins.DistillHook',
        'teacher.config': teacher['config'],
        'teacher.checkpoint': teacher['checkpoint'],
        'terms.logits.loss.type': LOGITS['loss']['type'],
        'terms.logits.student': 'bbox_head',
        'terms.logits.teacher': 'bbox_head',
    }
    work = str(lab.root / 'stock')
    done = lab.run(
        str(MMDET_TRAIN),
        str(lab.file(width=4)),
        '--work-dir',
        work,
        '--cfg-options',
        *(f'default_hooks.distill.{k}={v}' for k, v in options.items()),
        'val_cfg=None',
        'val_dataloader=None',
        'val_evaluator=None',
        cwd=lab.root,
    )
    assert done.stdout.count('Knowledge distillation is ON') == 1
    assert 'loss_kd_logits: ' in done.stdout and 'kd_ratio: ' in done.stdout
    assert (Path(work) / 'epoch_1.pth').is_file()


def test_the_ten_line_config_runs_under_mmdets_own_train_script(lab, runners, monkeypatch):
    """What README shows, the model form, through ``custom_imports`` and ``_base_``."""
    teacher = lab.teacher()
    path = lab.root / 'ten_lines.py'
    path.write_text(f"""_base_ = '{lab.file(width=4).as_posix()}'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
model = dict(
    type='kd_plugins.Distilled', student_type=_base_.model.type,
    distill=dict(
        teacher=dict(config='{teacher['config']}', checkpoint='{teacher['checkpoint']}'),
        terms=dict(neck=dict(loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck'))))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook'))
val_cfg = val_dataloader = val_evaluator = None
""")
    monkeypatch.setattr(sys, 'argv', ['train.py', str(path), '--work-dir', str(lab.root / 'ten_lines')])
    runpy.run_path(str(MMDET_TRAIN), run_name='__main__')
    assert type(runners[0].model).__name__ == 'DistilledYOLOX'
    assert 'loss_kd_neck' in logged(runners[0])


def test_kd_on_a_distilled_config_is_refused(lab):
    config = lab.hook_form(lab.plain(), lab.teacher())
    with pytest.raises(DistillError, match='already distils'):
        cli.train([lab.dump(config), *kd(lab.teacher(), 'feature')])


def test_none_as_the_hook_trains_the_plain_student(lab, runners):
    """The undistilled run of a distilled config, in both forms, bit for bit; MMEngine alone ends in an assertion."""
    plain = lab.plain()
    cli.train([lab.dump(plain), '--seed', '3'])
    for form in (lab.hook_form, lab.model_form):
        path = lab.dump(form(plain, lab.teacher()))
        cli.train([path, '--seed', '3', '--cfg-options', 'default_hooks.distill=None'])
    first, *others = (runner.model.state_dict() for runner in runners)
    assert len(others) == 2
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[k], other[k]) for k in first)
    assert not any('kd' in name for runner in runners for name in logged(runner))


def test_half_of_the_kd_options_is_refused(lab):
    with pytest.raises(DistillError, match='--teacher-checkpoint is missing'):
        cli.train([lab.dump(lab.plain()), '--kd', 'feature', '--teacher', 'x.py'])


def test_a_distilled_config_becomes_the_plain_one_again(lab):
    plain = lab.plain()
    for form in (lab.hook_form, lab.model_form):
        config = Config(form(plain, lab.teacher()).to_dict())
        remove_distillation(config)
        assert config.model.to_dict() == plain.model.to_dict()
        assert config.default_hooks.to_dict() == plain.default_hooks.to_dict()
