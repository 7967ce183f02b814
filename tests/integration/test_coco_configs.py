"""The COCO recipes, built at full size: one training step on COCO-shaped data through the Runner."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from kd_plugins.mm.configs import load_config, plain_model
from tests.integration.synthetic import Watch, dataloader, save_teacher, short_run, train, write_coco

CONFIGS = Path(__file__).parents[2] / 'configs' / 'det'
RECIPES = sorted(CONFIGS.glob('*_coco.py'))
# (student, teacher, form) as the README's table has them.
PAIRS = {
    'yolox_tiny_logit_yolox_l': ('YOLOX', 5.1, 54.2, 'hook'),
    'rtmdet_tiny_logit_rtmdet_l': ('RTMDet', 4.9, 52.3, 'hook'),
    'gfl_r50_localization_gfl_r101': ('GFL', 32.4, 51.4, 'hook'),
    'yolox_s_feature_yolox_l': ('YOLOX', 9.0, 54.2, 'model'),
    'retinanet_r50_feature_retinanet_r101': ('RetinaNet', 38.0, 57.0, 'hook'),
    'yolox_s_cross_family_gfl_r101': ('YOLOX', 9.0, 51.4, 'hook'),
    'rtmdet_tiny_cwd_rtmdet_l': ('RTMDet', 4.9, 52.3, 'model'),
    'retinanet_r50_pkd_retinanet_r101': ('RetinaNet', 38.0, 57.0, 'hook'),
    'retinanet_r50_mgd_retinanet_r101': ('RetinaNet', 38.0, 57.0, 'model'),
}


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """COCO-shaped data: 80 classes with their real names, images that are not square."""
    from mmdet.datasets import CocoDataset

    classes = CocoDataset.METAINFO['classes']
    folder = write_coco(tmp_path_factory.mktemp('coco'), classes, images=2, size=(160, 120))
    return dataloader(folder, classes, size=160)


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Random weights of the full-size teachers, each written once."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}

    def write(teacher):
        if teacher['config'] not in made:
            from mmdet.datasets import CocoDataset

            config = load_config(teacher['config'])
            name = Path(teacher['checkpoint']).stem
            made[teacher['config']] = save_teacher(config, folder, CocoDataset.METAINFO['classes'], name)['checkpoint']
        return made[teacher['config']]

    return write


def options(config):
    """Where a config keeps its ``teacher`` and ``terms``."""
    return config.model.distill if 'distill' in config.model else config.default_hooks.distill


def test_every_recipe_is_listed():
    assert {p.stem.removesuffix('_coco') for p in RECIPES} == set(PAIRS)


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_recipe_is_short_and_names_official_files(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 15
    assert 'COCO numbers have not been run here' in path.read_text()
    config = Config.fromfile(path)
    base = re.match(r"_base_ = '(.*)'", next(line for line in lines if line.startswith('_base_'))).group(1)
    assert {k: v for k, v in plain_model(config.model).items() if k != '_scope_'} == load_config(base).model
    assert not {'teacher', 'terms', 'distill', 'taps', 'loss'} & set(config)  # --cfg-options there would change nothing
    teacher = options(config).teacher
    folder, name = teacher.checkpoint.split('/')
    assert folder == 'checkpoints'
    family = Path(load_config(teacher.config).filename).parent
    weights = [line.split()[-1] for line in (family / 'metafile.yml').read_text().splitlines() if 'Weights:' in line]
    # The comment gives the address of the folder; OneDL mirrors the same paths on a server of its own.
    address = next(line.split()[-3] for line in lines if line.startswith('# Teacher: https://'))
    stored = next(w for w in weights if w.endswith(f'/{name}'))
    assert stored.split('/mmdetection/')[1] == f'{address.split("/mmdetection/")[1].removesuffix("<file")}{name}'


@pytest.mark.long
@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_recipe_trains_one_step(path, coco, checkpoints, tmp_path):
    architecture, student_size, teacher_size, form = PAIRS[path.stem.removesuffix('_coco')]
    config = Config.fromfile(path)
    hooks = [h['type'] for h in config.get('custom_hooks', [])]
    options(config).teacher.checkpoint = checkpoints(options(config).teacher)
    config = short_run(config, tmp_path, coco, epochs=None)
    config.default_hooks.checkpoint = None
    watch, runner = train(config, Watch(stop_after=1))

    model, distiller = runner.model, next(h for h in runner.hooks if type(h).__name__ == 'DistillHook').session
    assert type(model).__name__ == ('Distilled' if form == 'model' else '') + architecture
    size = sum(p.numel() for p in model.parameters())
    assert size / 1e6 == pytest.approx(student_size, abs=0.06)
    assert distiller.teacher.parameters_count / 1e6 == pytest.approx(teacher_size, abs=0.06)
    assert set(hooks) <= {type(h).__name__ for h in runner.hooks}  # EMA, pipeline switch: all of mmdet's

    (losses,) = watch.losses
    terms = [f'loss_kd_{name}' for name in options(config).terms]
    assert terms and all(0 < losses[term] < float('inf') for term in terms)
    assert losses['kd_ratio'] > 0
    assert watch.steps == 1
    assert watch.gradients and all(torch.isfinite(g).all() for g in watch.gradients.values())
    if form == 'model':
        assert any(n.startswith('kd_adapters') and g.abs().sum() > 0 for n, g in watch.gradients.items())
