"""The benchmark runs on a tiny pair and reports what it measured; how fast is not tested here."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('mmdet')

from mmengine.registry import MODELS

from kd_plugins.errors import DistillError
from kd_plugins.lab.benchmark import main
from kd_plugins.lab.benchmark.measure import highest_memory
from kd_plugins.lab.benchmark.mm import MMPair, batches

ROOT = Path(__file__).parents[4]
TINY = """
_base_ = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'
model = dict(
    backbone=dict(widen_factor={widen}),
    neck=dict(in_channels=[int(c * {widen}) for c in (256, 512, 1024)], out_channels={channels}, num_csp_blocks=1),
    bbox_head=dict(num_classes=3, in_channels={channels}, feat_channels={channels}),
)
train_dataloader = dict(dataset=dict(dataset=dict(metainfo=dict(classes=('a', 'b', 'c')))))
"""
SMALL = ['--image-size', '64', '96', '--batch-size', '2', '--repeats', '2', '--device', 'cpu']


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp('benchmark')
    (folder / 'student.py').write_text(TINY.format(widen=0.125, channels=16))
    (folder / 'teacher.py').write_text(TINY.format(widen=0.25, channels=32))
    return ['--student', str(folder / 'student.py'), '--teacher', str(folder / 'teacher.py')]


def classifiers(student, teacher):
    folder = ROOT / 'configs' / 'cls'
    teacher = teacher if '::' in teacher else str(folder / f'{teacher}.py')
    return ['--student', str(folder / f'{student}.py'), '--teacher', teacher]


@pytest.mark.parametrize(
    ('recipe', 'form', 'models'),
    [
        ('yolo_logit', 'hook', None),
        pytest.param('feature', 'hook', None, marks=pytest.mark.long),
        ('deit_token', 'hook', ('digits_deit_student', 'digits_resnet_teacher')),
        ('vit_feature', 'hook', ('digits_resnet_student', 'digits_vit_teacher')),
        ('multi_label', 'hook', ('digits_multilabel_student', 'digits_multilabel_teacher')),
    ],
)
def test_measures_a_pair(pair, recipe, form, models, tmp_path, capsys):
    file = tmp_path / 'figures.json'
    chosen, size = (pair, SMALL) if models is None else (classifiers(*models), SMALL[3:])
    (result,) = main([*chosen, '--kd', recipe, *size, '--no-memory', '--json', str(file)])
    assert result['form'] == form
    assert all(len(result['seconds'][name]['all']) == 2 for name in ('student', 'teacher', 'distilled'))
    both = result['operators']['student'] + result['operators']['teacher']
    assert both < result['operators']['distilled'] < 1.5 * both
    waiting = result['waiting']
    assert waiting['teacher'] == 0
    # AdamW reads the step counter, which lies on the CPU, of each parameter: here weight and bias of two adapters.
    counters = 4 if recipe == 'vit_feature' else 0
    assert waiting['distilled'] == waiting['student'] + counters, 'distillation makes the host wait for the GPU'
    shown = capsys.readouterr().out
    assert MMPair.table(result) in shown
    assert f'{form} form' in shown and 'aim <= 1.05' in shown
    assert json.loads(file.read_text())['pairs'][0]['ratio'] == result['ratio']


def test_a_distilled_config_stands_for_its_plain_student_and_teachers_are_named_as_in_training(capsys):
    chosen = classifiers('resnet8x4_kl_resnet32x4_cifar100', 'timm::resnet10t')
    (result,) = main([*chosen, '--kd', 'kl', *SMALL[3:], '--no-memory'])
    assert result['setup']['image_size'] == (32, 32), 'not the size that the student is made for'
    assert result['operators']['student'] < result['operators']['distilled']
    assert 'timm::resnet10t (random weights)' in capsys.readouterr().out


def test_operators_alone(capsys, monkeypatch):
    """Counted, not timed; and what kind of model the student is is found out once, though it is started four times."""
    found = []
    counting = SimpleNamespace(build=lambda cfg: found.append(cfg) or MODELS.build(cfg))
    monkeypatch.setattr(batches, 'MODELS', counting)
    chosen = classifiers('digits_deit_student', 'digits_resnet_teacher')
    (result,) = main([*chosen, '--kd', 'kl', *SMALL[3:], '--operators'])
    assert len(found) == 1
    assert result['seconds'] is None and result['ratio'] is None and result['memory'] is None
    both = result['operators']['student'] + result['operators']['teacher']
    assert both < result['operators']['distilled']
    # A zero for each term, their sum and the ratio are logged; no teacher runs.
    assert 0 <= result['operators']['over'] - result['operators']['student'] < 20
    startup = result['startup']
    assert all(len(x['all']) == 2 for x in startup.values()) and 0 < startup['attaching_processor']['median']
    shown = capsys.readouterr().out
    assert MMPair.table(result) in shown
    assert 'peak memory' not in shown and 'before_train' in shown and 'start-up +, median of 2' in shown
    assert f'{both:>11}' in shown, 'the sum is what a distilled step cannot do without'


@pytest.mark.long
@pytest.mark.slow
def test_the_tool_measures_memory_in_processes_of_its_own(pair):
    command = [sys.executable, str(ROOT / 'tools' / 'benchmark.py'), *pair, '--kd', 'yolo_logit', *SMALL]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown.count(' MiB') == (0 if highest_memory(str, 1, torch.device('cpu')) is None else 4)
    assert 'distilled step' in shown


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--pair', 'yolx'], "did you mean .*'yolox'"),
        (['--student', 'a.py', '--kd', 'feature'], '--teacher is missing'),
        (['--pair', 'yolox', '--teacher-checkpoint', 'x.pth'], 'belongs to a pair of your own'),
        (['--device', 'cpu', '--amp'], '--amp needs --device cuda'),
        (['--repeats', '0'], 'repeats must be at least 1, got 0'),
        (
            [*classifiers('digits_deit_student', 'digits_resnet_teacher'), '--kd', 'kl', '--image-size', '9', '9'],
            '--image-size 9 9: this classifier takes images of 8 x 8 pixels; leave the option out',
        ),
        (
            [*classifiers('digits_deit_student', 'torchvision::resnet19'), '--kd', 'kl'],
            r"--teacher: torchvision has no classifier 'resnet19'; did you mean .*'resnet18'",
        ),
        (
            [*classifiers('digits_deit_student', 'timm::resnet19'), '--kd', 'kl'],
            r"--teacher: .*'resnet19'; did you mean .*'resnet18'",
        ),
        (
            [
                *classifiers('digits_deit_student', 'timm::x')[:3],
                'x.pt2',
                '--kd',
                'kl',
                '--teacher-checkpoint',
                'x.pth',
            ],
            r"--teacher-checkpoint belongs to the config or the name of a teacher; 'x.pt2'",
        ),
        (
            ['--student', 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '--teacher', 'x.py', '--kd', 'kl'],
            'one-stage detectors .* and for kd_plugins.TimmClassifier; MaskRCNN is neither',
        ),
    ],
)
def test_refuses_what_cannot_be_measured(options, message):
    with pytest.raises(DistillError, match=message):
        main(options)
