"""The commands, ours and the frameworks' own, on distilled configs of all kinds of MMEngine's models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from kd_plugins.mm import cli
from tests.integration.labs import kept
from tests.integration.promises import difference, read, without


@pytest.fixture
def lab(request, labs):
    """The lab of a case."""
    return labs(request.param)


@pytest.fixture
def command(monkeypatch):
    """Runs a function or a script of a framework in this process; the runner that it made, and the metrics of a
    test."""
    found = []
    for name in ('train', 'test'):
        inner = getattr(Runner, name)

        def noted(self, inner=inner):
            found.append((self, result := inner(self)))
            return result

        monkeypatch.setattr(Runner, name, noted)

    def run(what, *arguments):
        found.clear()
        arguments = [str(a) for a in arguments]
        if callable(what):
            what(arguments)
        else:
            monkeypatch.setattr(sys, 'argv', [str(what), *arguments])
            runpy.run_path(str(what), run_name='__main__')
        (pair,) = found
        return pair

    return run


def logged(runner):
    """Names of what a run logged in training."""
    return {k.removeprefix('train/') for k in runner.message_hub.log_scalars if k.startswith('train/')}


def under(name, config):
    """Arguments with which a command runs a config under a name of its own."""
    return '--work-dir', config.work_dir + name, '--cfg-options', f'experiment_name={config.experiment_name}{name}'


def kd(recipe, teacher):
    return ['--kd', recipe, '--teacher', teacher['config'], '--teacher-checkpoint', teacher['checkpoint']]


@kept('scripts')
def test_a_distilled_config_is_tested_without_its_teacher(lab, case, command):
    """By our command, as the plain student, and in the framework's own way, on the config as it is."""
    plain, ours = lab.pair(case)
    checkpoint, config = ours.files[-1], lab.distil(case)
    path = lab.dump(config, 'test.py')
    with without(lab.files(lab.teacher(**case.teacher))):
        tested, metrics = command(cli.test, path, checkpoint, *under('_test', config))
        own, found = command(*lab.own_test(path, checkpoint), *under('_own', config))
    assert lab.METRIC in metrics and found == metrics
    assert type(tested.model) is type(plain.model)
    for runner in (tested, own):
        assert difference(read(checkpoint)['state_dict'], runner.model.state_dict()) == {}
        assert [tuple(p.shape) for p in runner.model.parameters()] == [tuple(p.shape) for p in plain.model.parameters()]


@kept('augmented')
def test_a_distilled_config_is_tested_with_augmentation(lab, case, command):
    """The framework's own script wraps the model that it builds from the config."""
    checkpoint, config = lab.pair(case)[1].files[-1], lab.tta(lab.distil(case))
    with without(lab.files(lab.teacher(**case.teacher))):
        tested, metrics = command(
            lab.tools / 'test.py',
            lab.dump(config, 'tta.py'),
            checkpoint,
            '--tta',
            '--work-dir',
            config.work_dir + '_tta',
        )
    assert type(tested.model).__name__ == lab.TTA and lab.METRIC in metrics
    assert difference(read(checkpoint)['state_dict'], tested.model.module.state_dict()) == {}


@kept('own_train')
def test_the_frameworks_own_script_trains_the_distilled_config(lab, case, command):
    config = lab.distil(case)
    runner, _ = command(lab.tools / 'train.py', lab.dump(config), '--work-dir', config.work_dir)
    assert {f'loss_kd_{name}' for name in case.terms} | {'kd_ratio'} <= logged(runner)


@kept('recipes')
def test_recipes(lab, case, command):
    """``train --kd`` on a plain config, and ``test`` on what it saved, the teacher's files gone."""
    config, teacher = lab.plain_of(case), lab.teacher(**case.teacher)
    path = lab.dump(config)
    before = Path(path).read_text()
    runner, _ = command(cli.train, path, *kd(case.distill['recipe'], teacher))
    session = lab.session(runner)
    assert set(case.terms) <= set(session.terms)
    assert {f'loss_kd_{name}' for name in session.terms} | {'kd_ratio'} <= logged(runner)
    assert all(runner.message_hub.get_scalar(f'train/loss_kd_{name}').current() > 0 for name in session.terms)
    assert type(runner.model) is type(lab.build(config)), 'the model keeps its class'
    assert session.trainable == bool(case.trained)
    assert Path(path).read_text() == before
    (checkpoint,) = Path(config.work_dir).glob('*_[0-9].pth')
    with without(lab.files(teacher)):
        tested, metrics = command(cli.test, path, checkpoint, *under('_test', config))
    lab.assert_metrics(metrics, case)
    assert difference(read(checkpoint)['state_dict'], tested.model.state_dict()) == {}


def test_several_recipes_changed_from_the_command_line(seg_lab, command):
    """Merged terms, ``--kd-options`` and ``--cfg-options`` on the hook that ``--kd`` makes, in one short run."""
    path = seg_lab.dump(Config(seg_lab.plain().to_dict()))
    words = ['weight=2', 'logits_cwd.weight=0.5', 'alpha=0.7', 'stop=1000']
    changes = ['default_hooks.distill.terms.logits.loss.temperature=2.0', 'default_hooks.distill.start=0']
    teacher = kd('pixel_kl', seg_lab.teacher())
    teacher.insert(teacher.index('pixel_kl') + 1, 'cwd')
    runner, _ = command(cli.train, path, *teacher, '--kd-options', *words, '--cfg-options', *changes)
    session = seg_lab.session(runner)
    assert {name: term.weight(0) for name, term in session.terms.items()} == dict(logits=2.0, logits_cwd=0.5)
    assert session.alpha == 0.7 and session.window.stop == 1000
    assert session.terms['logits'].loss.temperature == 2.0
    assert {'loss_kd_logits', 'loss_kd_logits_cwd', 'kd_ratio'} <= logged(runner)


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
    runner, _ = command(seg_lab.tools / 'train.py', path, '--cfg-options', *changes)
    assert {'loss_kd_logits', 'kd_ratio'} <= logged(runner)


def test_distilling_an_unedited_config_of_a_classifier_from_the_command_line(cls_lab, command):
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
    changes = [f'default_hooks.distill.{k}={v}' for k, v in options.items()]
    runner, _ = command(cli.train, path, '--cfg-options', *changes)
    assert {'loss_kd_token', 'kd_ratio'} <= logged(runner)
    assert cls_lab.session(runner).terms['token'].loss.temperature == 3.0


class Small(nn.Sequential):
    """A network that can be exported in no time.

    Args:
        classes: How many it predicts.
    """

    def __init__(self, classes):
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
        )


def foreign_teacher(kind, folder, classes, size):
    """What ``--teacher`` and ``--teacher-checkpoint`` are for a teacher that is no config."""
    torch.manual_seed(1)
    if kind == 'pt2':
        batch = torch.export.Dim('batch', min=1, max=64)
        example = (torch.randn(2, 3, size, size),)
        program = torch.export.export(Small(classes).eval(), example, dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / 'teacher.pt2')
        return [folder / 'teacher.pt2']
    if kind == 'torchscript':
        torch.jit.save(torch.jit.script(Small(classes).eval()), folder / 'teacher.torchscript')
        return [folder / 'teacher.torchscript']
    if kind == 'timm':
        import timm

        net = timm.create_model('test_resnet', num_classes=classes)
    else:
        import torchvision

        net = torchvision.models.get_model('squeezenet1_1', weights=None, num_classes=classes)
    torch.save(net.state_dict(), folder / 'teacher.pth')
    name = 'test_resnet' if kind == 'timm' else 'squeezenet1_1'
    return [f'{kind}::{name}', '--teacher-checkpoint', folder / 'teacher.pth']


@pytest.mark.parametrize('kind', ['timm', 'torchvision', 'pt2', 'torchscript'])
def test_teachers_of_other_kinds_from_the_command_line(cls_lab, kind, command, tmp_path):
    config, classes = cls_lab.plain('deit', val=True), len(cls_lab.CLASSES)
    path = cls_lab.dump(config)
    teacher = foreign_teacher(kind, tmp_path, classes, cls_lab.SIZE)
    runner, _ = command(cli.train, path, '--kd', 'deit_token', '--teacher', *teacher)
    assert runner.message_hub.get_scalar('train/loss_kd_token').current() > 0
    assert cls_lab.session(runner).teacher.num_classes == classes
    for file in tmp_path.iterdir():
        file.unlink()
    _, metrics = command(cli.test, path, Path(config.work_dir) / 'epoch_1.pth', *under('_test', config))
    assert cls_lab.METRIC in metrics
