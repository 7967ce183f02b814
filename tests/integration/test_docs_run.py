"""The commands and snippets of the manual do what they say: each page runs in a folder of its own, at toy sizes."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kd_plugins.cli import COMMANDS, find_command
from kd_plugins.predictions import readers
from tests.doc_blocks import PAGES, ROOT, read

#: What the manual says: what is run instead, on every page. The only place where sizes shrink.
INSTEAD = {
    # Schedules.
    'epochs=300': 'epochs=1',
    'epochs=100': 'epochs=1 imgsz=64 batch=4 workers=0',
    '--epochs 100': '--epochs 1',
    '--seeds 3': '--seeds 1',
    'stop=1000': 'stop=2',
    'kd_stop=280': 'kd_stop=1',
    'iterations=30 epochs=10': 'iterations=1 epochs=1',
    'weight=1,3,10': 'weight=1,3',
    'weight=3,auto:0.5': 'weight=auto:0.5',
    'epoch_300.pth': 'epoch_1.pth',
    '--out big.py': '--epochs 1 -b 2 -j 0 --out big.py',
    '--out small.py \\\n    --student': '--epochs 1 -b 2 -j 0 --out small.py --student',
    '--out small.py \\\n    --classes': '--iters 2 -b 2 -j 0 --out small.py --classes',
    # Not over the one of this repository.
    'tools/draw_results.py': 'tools/draw_results.py --out results.png',
    # Sizes.
    '--batch-size 64 --img-size 224': '--batch-size 8 --img-size 32 --workers 0',
    '--data my_images --teacher': '--data my_images --epochs 1 --batch-size 8 --img-size 32 --workers 0 --teacher',
    # Models whose training or whose data set is too big.
    '--model resnet18': '--model test_resnet',
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': './my_plain_config.py',
    'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py': 'my_plain_config.py',
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': 'my_plain_config.py',
    'mmdet::yolox/yolox_l_8xb8-300e_coco.py': 'my_teacher.py',
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py': 'my_segmentor.py',
    'mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py': 'my_big_segmentor.py',
    'pspnet_r101.pth': 'big.pth',
    'sky road car --ignore': 'sky road car tree --ignore',
    'timm::regnety_160.deit_in1k': 'timm::test_resnet.r160_in1k',
    'timm::regnety_160': 'timm::test_resnet',
    'regnety_160.pth': 'timm.pth',
}


def small() -> dict[str, Any]:
    """What every command of Ultralytics is given besides; it puts relative folders elsewhere under pytest."""
    project = str(Path('runs/detect').absolute())
    return dict(imgsz=64, batch=4, workers=0, device='cpu', amp=False, plots=False, exist_ok=True, project=project)


def shrunk(text: str) -> str:
    """A block with what `INSTEAD` says."""
    for said, run in INSTEAD.items():
        text = text.replace(said, run)
    return text


def pair(labs, kind, student, teacher, weights, family):
    """Puts a student's config, a teacher's and its weights into the current folder."""
    lab = labs(kind)
    found = lab.teacher(family)
    shutil.copy(lab.file(family, 4), student)
    shutil.copy(found['config'], teacher)
    shutil.copy(found['checkpoint'], weights)


def detectors(labs, student='my_small.py', teacher='my_big.py', weights='big.pth'):
    pair(labs, 'detection', student, teacher, weights, 'yolox')


def plain_detectors(labs):
    detectors(labs, 'my_plain_config.py', 'my_teacher.py', 'yolox_l.pth')


def own_coco(labs):
    root = labs('detection').root
    for name in ('train.json', 'val.json'):
        shutil.copy(root / 'annotations.json', name)
    shutil.copytree(root / 'images', 'images')


def own_maps(labs):
    """Folders of images and maps, and a teacher as a run leaves it: its config beside its weights."""
    import torch

    root = labs('segmentation').root
    for part in ('train', 'val'):
        shutil.copytree(root / 'images', f'images/{part}')
        shutil.copytree(root / 'labels', f'maps/{part}')
    Path('work_dirs/big').mkdir(parents=True)
    shutil.copy('my_big_segmentor.py', 'work_dirs/big')
    saved = torch.load('big.pth', weights_only=False)
    weights = saved.get('state_dict', saved)
    meta = dict(experiment_name='my_big_segmentor_20260101_000000')
    torch.save(dict(state_dict=weights, meta=meta), 'work_dirs/big/iter_80000.pth')


def segmentors(labs, student='my_segmentor.py', teacher='my_big_segmentor.py'):
    pair(labs, 'segmentation', student, teacher, 'big.pth', 'fcn')


def classifier(labs):
    import timm
    import torch

    lab = labs('classification')
    shutil.copy(lab.file(), 'my_classifier.py')
    net = timm.create_model('test_resnet', num_classes=len(lab.CLASSES))
    torch.save(net.state_dict(), 'timm.pth')
    args = dict(model='test_resnet', num_classes=len(lab.CLASSES), img_size=32, model_kwargs={})
    torch.save(dict(arch='test_resnet', state_dict=net.state_dict(), args=args), 'model_best.pth.tar')
    shutil.copytree(lab.root / 'images', 'my_images')


def ultralytics(labs):
    from tests.integration.yolo_lab import save_teacher, write_data

    shutil.copy(write_data(Path.cwd() / 'data'), 'coco.yaml')
    save_teacher(Path('yolo11x.pt'), 'yolov8n.yaml')


def yolo_maps(labs):
    """A COCO set in folders of its own."""
    own_coco(labs)
    for part in ('train', 'val'):
        shutil.copytree('images', f'all/{part}')
    shutil.rmtree('images')
    shutil.move('all', 'images')


def more_classes(labs):
    """Two sets: the old model knows the first two of the new one's three classes."""
    from tests.integration.yolo_lab import COLOURS, save_teacher, write_data

    shutil.copy(write_data(Path.cwd() / 'data'), 'new_classes.yaml')
    save_teacher(Path('old.pt'), 'yolov8n.yaml', names=tuple(COLOURS)[:2])
    detectors(labs, 'my_config.py', 'old_config.py', 'old.pth')
    shutil.copy('old_config.py', 'my_config.py')


#: What lies in the folder of a page, of the kinds of files that its reader has.
FILES = {
    'README.md': [detectors, classifier, ultralytics],
    'docs/start/mmdet.md': [plain_detectors, own_coco],
    'docs/start/mmseg.md': [segmentors, own_maps],
    'docs/start/timm.md': [classifier],
    'docs/start/ultralytics.md': [ultralytics],
    'docs/incremental.md': [more_classes],
    'docs/recipes.md': [lambda labs: segmentors(labs, 'my_config.py', 'big.py'), ultralytics],
    'docs/policy.md': [lambda labs: segmentors(labs, 'my_config.py', 'big.py'), ultralytics],
    'docs/measuring.md': [detectors, ultralytics, yolo_maps],
}


def run_command(words: list[str]) -> None:
    """Runs one command of ours in this process."""
    while '=' in words[0]:
        words = words[1:]
    if words[0] == 'python':
        assert (ROOT / words[1]).is_file(), words[1]
        name = Path(words[1]).stem.replace('_', '-')
        if name not in COMMANDS:
            with mock.patch.object(sys, 'argv', words[1:]):
                runpy.run_path(str(ROOT / words[1]), run_name='__main__')
            return
        words = ['kd-plugins', name, *words[2:]]
    if words[0] == 'kd-plugins':
        words = [str(ROOT / w) if w.startswith('configs/') else w for w in words]
        find_command(words[1])(words[2:])
    elif words[0] == 'yolo-kd':
        from kd_plugins.yolo.cli import main

        assert main([*words[1:], *(f'{k}={v}' for k, v in dict(small(), epochs=1).items())]) == 0
    else:
        pytest.fail(f'no way to run {" ".join(words)!r}: mark it, or add one here')


def run_python(body: str) -> None:
    """Runs a snippet; a config is left for the commands after it, and is trained where it says with what."""
    if 'custom_imports' not in body:
        given = ', '.join(f'{k}={v!r}' for k, v in small().items())
        Path('snippet.py').write_text(body.replace('epochs=1)', f'epochs=1, {given})'))
        runpy.run_path('snippet.py', run_name='__main__')
        return
    from mmengine.config import Config
    from mmengine.registry import HOOKS, MODELS, init_default_scope

    Path('my_kd_config.py').write_text(body)
    config = Config.fromfile('my_kd_config.py')
    init_default_scope(config.get('default_scope', 'mmengine'))
    MODELS.build(config.model)
    HOOKS.build(config.default_hooks.distill)


WITH_BLOCKS = [page for page in PAGES if any('' not in b.excuses for b in read(page))]


@pytest.mark.long
@pytest.mark.parametrize('page', WITH_BLOCKS, ids=[str(p.relative_to(ROOT)) for p in WITH_BLOCKS])
def test_a_page_runs(page, labs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package in ('kd_plugins.mm', 'kd_plugins.yolo'):
        import_module(package)  # what they register stays
    known = {form: dict(table) for form, table in readers._readers.items()}
    monkeypatch.setattr(readers, '_readers', known)  # what a snippet registers ends with its page
    for put in FILES.get(str(page.relative_to(ROOT)), ()):
        put(labs)
    failed = []
    for block in read(page):
        if '' in block.excuses:
            continue
        block = replace(block, body=shrunk(block.body))
        python = block.language == 'python'
        for what in [block.body] if python else block.commands():
            try:
                (run_python if python else run_command)(what)
            except (Exception, SystemExit) as error:
                if not (isinstance(error, SystemExit) and error.code in (None, 0)):
                    failed.append(f'line {block.line}: {what}\n    {type(error).__name__}: {str(error)[:600]}')
    assert not failed, '\n'.join(failed)
    assert os.getcwd() == str(tmp_path)
