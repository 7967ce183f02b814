"""``kd-plugins init`` and ``kd-plugins train --model --data``: what they write runs, and the teacher is found."""

import argparse
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from kd_plugins.cli import main
from kd_plugins.mm import cli
from tests.integration.lab import session_of


def trained(path, runners, *words):
    cli.train([str(path), '--work-dir', str(path.with_suffix('')), *words])
    return runners[-1]


def logged(runner, name):
    return runner.message_hub.get_scalar(f'train/{name}').data[0]


def test_a_detector_on_a_coco_file(lab, runners, tmp_path, capsys):
    data = [str(lab.root / 'annotations.json'), str(lab.root / 'images')]
    teacher = lab.teacher()
    out = tmp_path / 'mine.py'
    # The student of other classes than the data: its config says 3 of the lab's, here it is 80.
    words = ['init', 'coco', '--train', *data, '--val', *data, '--student', str(lab.file(width=4, classes=80))]
    words += ['--teacher-config', teacher['config'], '--teacher-checkpoint', teacher['checkpoint']]
    words += ['--epochs', '2', '-b', '4', '-j', '0', '--seed', '5', '--out', str(out)]
    main(words)
    # Two heads of one family: they teach best.
    assert '(distilled by yolo_logit); look it through, then: kd-plugins train' in capsys.readouterr().out
    runner = trained(out, runners)
    assert runner.model.bbox_head.num_classes == 3 and runner.seed == 5
    assert runner.train_dataloader.dataset.metainfo['classes'] == lab.CLASSES
    assert (runner.max_epochs, runner.max_iters) == (2, 4) and len(logged(runner, 'loss_kd_logits')) == 4
    text = out.read_text()
    assert text.count('#') > 8 and '_base_.model.bbox_head.num_classes = 3' in text and 'teacher=dict(' in text
    # The plain student, to compare with.
    assert (
        session_of(trained(out, runners, '--cfg-options', 'default_hooks.distill=None', 'train_cfg.max_epochs=1'))
        is None
    )
    with pytest.raises(SystemExit, match='exists; give another name, or --force'):
        main(words)


def test_a_segmentor_on_folders(seg_lab, runners, tmp_path):
    root = seg_lab.root
    teacher = seg_lab.teacher()
    folders = [f'{root}/images', f'{root}/labels']
    out = tmp_path / 'mine.py'
    words = ['init', 'segmentation', '--train', *folders, '--val', *folders, '--student', str(seg_lab.file(width=4))]
    words += [
        '--classes',
        *seg_lab.CLASSES,
        '--teacher',
        teacher['config'],
        '--teacher-checkpoint',
        teacher['checkpoint'],
    ]
    main([*words, '--iters', '2', '-b', '2', '-j', '0', '--out', str(out)])
    runner = trained(out, runners)
    assert len(logged(runner, 'loss_kd_logits')) == 2
    assert runner.train_dataloader.dataset.metainfo['classes'] == seg_lab.CLASSES


@pytest.fixture(scope='module')
def timm_teacher(cls_lab, tmp_path_factory):
    """As timm's train.py saves one."""
    timm = pytest.importorskip('timm')
    net = timm.create_model('test_resnet', num_classes=4)
    args = argparse.Namespace(model='test_resnet', num_classes=4, img_size=32, model_kwargs={})
    path = tmp_path_factory.mktemp('timm') / 'model_best.pth.tar'
    torch.save(dict(epoch=1, arch='test_resnet', state_dict=net.state_dict(), args=args), path)
    return str(path)


def test_a_model_of_timm_without_a_config(cls_lab, runners, tmp_path, timm_teacher):
    data, work = str(cls_lab.root / 'images'), tmp_path / 'work'
    words = ['--model', 'test_resnet.r160_in1k', '--data', data, '--epochs', '1', '-b', '8', '-j', '0', '--lr', '0.01']
    words += ['--img-size', '32', '--seed', '3', '--output', str(work)]
    cli.train([*words, '--teacher', timm_teacher])
    (runner,) = runners
    assert (runner.max_iters, runner.seed, runner.work_dir) == (2, 3, str(work))
    assert len(logged(runner, 'loss_kd_logits')) >= 1 and logged(runner, 'lr')[0] == pytest.approx(0.01, rel=0.5)
    # What it wrote is this run, and its comments survive MMEngine's own copy.
    path = work / 'configs' / 'test_resnet_r160_in1k.py'
    again = trained(path, runners)
    assert type(session_of(again).teachers['']).__name__ and '# -----' in path.read_text()
    assert again.cfg.default_hooks.distill.teacher.timm == 'test_resnet'
    for first, second in zip(runner.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(first, second)
    # Without a teacher: the plain student. Its config is another one, so the first stays.
    cli.train(words)
    assert session_of(runners[-1]) is None and (work / 'configs' / 'test_resnet_r160_in1k_2.py').is_file()
    assert Path(path).is_file()
    # A run of ours teaches as well, by the config beside its checkpoint.
    main(['init', 'images', data, '--model', 'test_vit', '--teacher', str(work / 'epoch_1.pth'), '--img-size', '32',
          '--out', str(tmp_path / 'next.py')])  # fmt: skip
    assert Config.fromfile(tmp_path / 'next.py').default_hooks.distill.teacher.config.startswith(str(work))
