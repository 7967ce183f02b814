"""The Cityscapes and ADE20K recipes, built at full size: one training step on tiny pictures through the Runner."""

import re
import runpy
import sys
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from kd_plugins import config as installed
from kd_plugins.mm import cli
from kd_plugins.mm.configs import load_config
from tests.integration.seg_lab import SIZE, SegLab
from tests.integration.synthetic import Watch, save_teacher, short_run, train

CONFIGS = Path(__file__).parents[2] / 'configs' / 'seg'
RECIPES = sorted(p for p in CONFIGS.glob('*.py') if p.stem.endswith(('_cityscapes', '_ade20k')))
# (data set, parameters of the student and of the teacher in millions); all are of the hook form.
PAIRS = {
    'pspnet_r18_kl_pspnet_r101_cityscapes': ('CityscapesDataset', 12.8, 68.0),
    'pspnet_r18_cwd_pspnet_r101_cityscapes': ('CityscapesDataset', 12.8, 68.0),
    'segformer_b0_cwd_segformer_b3_cityscapes': ('CityscapesDataset', 3.7, 44.6),
    'segformer_b0_kl_upernet_swin_ade20k': ('ADE20KDataset', 3.8, 60.0),
}
MMSEG_TRAIN = Path(mmseg.__file__).parent / '.mim' / 'tools' / 'train.py'
BASE = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Pictures and label maps whose few labels are classes of every data set."""
    folder = tmp_path_factory.mktemp('pictures') / 'data'
    SegLab.write_data(folder)
    return folder


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Random weights of the full-size teachers, each written once."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}

    def write(teacher, classes):
        if teacher['config'] not in made:
            config, name = load_config(teacher['config']), Path(teacher['checkpoint']).stem
            made[teacher['config']] = save_teacher(config, folder, classes, name)['checkpoint']
        return made[teacher['config']]

    return write


def classes_of(dataset):
    import mmseg.datasets

    return getattr(mmseg.datasets, dataset).METAINFO['classes']


def small(config, pictures, dataset, work_dir):
    """One iteration on two tiny pictures; the model stays as it is."""
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    data = dict(
        type='BaseSegDataset',
        data_root=str(pictures),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.png',
        seg_map_suffix='.png',
        metainfo=dict(classes=classes_of(dataset)),
        pipeline=pipeline,
    )
    config = short_run(
        config, work_dir, dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=data), epochs=None
    )
    config.model.data_preprocessor.size = (SIZE, SIZE)
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=10)
    config.default_hooks.checkpoint = None
    return config


def test_every_recipe_is_listed():
    assert {p.stem for p in RECIPES} == set(PAIRS)


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_recipe_is_short_and_names_official_files(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 15
    assert 'numbers have not been run here' in path.read_text()
    config = Config.fromfile(path)
    assert not {'teacher', 'terms', 'loss', 'name'} & set(config)  # --cfg-options there would change nothing
    base = re.search(r"config\('(mmseg::.*)'\)", next(line for line in lines if line.startswith('_base_'))).group(1)
    assert config.model == load_config(base).model
    assert config.train_dataloader == load_config(base).train_dataloader
    teacher = config.default_hooks.distill.teacher
    folder, name = teacher.checkpoint.split('/')
    assert folder == 'checkpoints'
    # OneDL mirrors the same paths on a server of its own.
    family = Path(load_config(teacher.config).filename).parent
    metafile = next(family / f'metafile.{end}' for end in ('yaml', 'yml') if (family / f'metafile.{end}').is_file())
    models = re.split(r'^ *- Name: ', metafile.read_text(), flags=re.MULTILINE)
    entry = next(m for m in models if m.startswith(f'{Path(teacher.config).stem}\n'))
    stored = re.search(r'Weights: (\S+)', entry).group(1)
    address = next(line for line in lines if line.startswith('# Teacher: https://')).split()[-1]
    assert address.startswith('https://download.openmmlab.com/mmsegmentation/') and address.endswith(f'/{name}')
    assert stored.split('/mmsegmentation/')[1] == address.split('/mmsegmentation/')[1]


@pytest.mark.long
@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_recipe_trains_one_step(path, pictures, checkpoints, tmp_path):
    dataset, student_size, teacher_size = PAIRS[path.stem]
    config = Config.fromfile(path)
    options = config.default_hooks.distill
    options.teacher.checkpoint = checkpoints(options.teacher, classes_of(dataset))
    watch, runner = train(small(config, pictures, dataset, tmp_path), Watch())

    distiller = next(h for h in runner.hooks if type(h).__name__ == 'DistillHook').session
    assert type(runner.model).__name__ == 'EncoderDecoder'
    assert sum(p.numel() for p in runner.model.parameters()) / 1e6 == pytest.approx(student_size, abs=0.06)
    assert distiller.teacher.parameters_count / 1e6 == pytest.approx(teacher_size, abs=0.06)
    assert distiller.classes == {'': None}  # the same on both sides

    (losses,) = watch.losses
    assert all(0 < losses[f'loss_kd_{name}'] < float('inf') for name in options.terms)
    assert losses['kd_ratio'] > 0
    assert watch.steps == 1
    assert watch.gradients and all(torch.isfinite(g).all() for g in watch.gradients.values())


# ---------------------------------------------------------------------- the way the recipes name their base
@pytest.fixture
def child(tmp_path):
    """A config on mmseg's own, which ``_base_ = 'mmseg::...'`` cannot name under the OneDL distributions."""
    path = tmp_path / 'child.py'
    path.write_text(
        f"_base_ = __import__('kd_plugins').config('{BASE}')\n"
        "custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)\n"
        'seen = [_base_.model.type, {{_base_.model.type}}]\n'
        'model = dict(decode_head=dict(dropout_ratio=0.2))\n'
    )
    return path


def test_base_in_an_installed_package_survives_dump_and_inheritance(child, tmp_path):
    config = Config.fromfile(child)
    expected = Config.fromfile(installed(BASE))
    assert config.seen == ['EncoderDecoder', 'EncoderDecoder']
    assert config.model.decode_head.pop('dropout_ratio') == 0.2
    assert expected.model.decode_head.pop('dropout_ratio') == 0.1
    assert config.model == expected.model
    config.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == config.to_dict()
    (tmp_path / 'grandchild.py').write_text("_base_ = './child.py'\nseen = {{_base_.model.type}}\n")
    assert Config.fromfile(tmp_path / 'grandchild.py').seen == 'EncoderDecoder'


@pytest.mark.parametrize('script', ['mmseg', 'kd_plugins'])
def test_base_in_an_installed_package_under_both_train_scripts(script, child, tmp_path, monkeypatch):
    """Up to the start of the training."""
    runners = []
    monkeypatch.setattr(Runner, 'train', lambda self: runners.append(self))
    command = [str(child), '--work-dir', str(tmp_path / 'work'), '--cfg-options', 'model.pretrained=None']
    command += [f'{part}_{key}=None' for part in ('val', 'test') for key in ('dataloader', 'cfg', 'evaluator')]
    if script == 'mmseg':
        monkeypatch.setattr(sys, 'argv', ['train.py', *command])
        runpy.run_path(str(MMSEG_TRAIN), run_name='__main__')
    else:
        cli.train(command)
    (runner,) = runners
    assert runner.model.decode_head.dropout_ratio == 0.2
    assert 'decode_head' in (tmp_path / 'work' / 'child.py').read_text()
