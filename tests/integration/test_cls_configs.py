"""The recipes for classifiers: ImageNet's and CIFAR's, built at full size and trained one step through the Runner."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

from kd_plugins.classification.cifar_resnet import CifarResNet
from kd_plugins.config_files import resolve_config
from kd_plugins.errors import DistillError
from kd_plugins.mm import cli
from kd_plugins.teachers import find_weights, load_checkpoint
from tests.integration.synthetic import Watch, build, short_run, train, write_coco

CONFIGS = Path(__file__).parents[2] / 'configs'
RECIPES = sorted(p for p in (CONFIGS / 'cls').glob('*_*_*.py') if p.stem.endswith(('_imagenet', '_cifar100')))
# (parameters of the student and of the teacher in millions, form).
PAIRS = {
    'deit_tiny_token_regnety_160_imagenet': (5.9, 83.6, 'hook'),
    'deit_small_token_regnety_160_imagenet': (22.4, 83.6, 'hook'),
    'resnet18_kl_resnet34_imagenet': (11.7, 21.8, 'hook'),
    'resnet18_dkd_resnet34_imagenet': (11.7, 21.8, 'hook'),
    'resnet18_dist_resnet34_imagenet': (11.7, 21.8, 'hook'),
    'resnet50_feature_deit_base_imagenet': (25.6, 86.6, 'model'),
    'resnet50_stage1_deit_base_imagenet': (25.6, 86.6, 'model'),
    'resnet50_stage2_deit_base_imagenet': (25.6, 86.6, 'model'),
    'resnet8x4_kl_resnet32x4_cifar100': (1.2, 7.4, 'hook'),
    'resnet8x4_dkd_resnet32x4_cifar100': (1.2, 7.4, 'hook'),
}
STAGE_1 = 'work_dirs/resnet50_stage1_deit_base_imagenet/epoch_30.pth'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Four pictures of every data set, in the layout that its config names."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    for name, side, classes, ending in (('imagenet', 240, 1000, 'JPEG'), ('cifar10', 32, 10, 'jpg')):
        for split in ('train', 'val'):
            for i in range(classes):
                folder = root / name / split / f'n{i:08d}'
                folder.mkdir(parents=True)
                if i < 4:
                    picture = rng.integers(0, 255, (side, side + 30, 3) if side > 32 else (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(picture).save(folder / f'{i}.{ending}')
    (root / 'cifar100').mkdir()
    for split in ('train', 'test'):
        images, labels = rng.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8), np.array([0, 1, 2, 99])
        np.savez(root / 'cifar100' / f'{split}.npz', images=images, labels=labels)
        part = {'test': 'val'}.get(split, split)
        names = [str(i) for i in range(10)]
        (root / 'digits' / 'scans').mkdir(parents=True, exist_ok=True)
        scans = rng.integers(0, 255, (40, 8, 8), dtype=np.uint8)
        np.savez(root / 'digits' / 'scans' / f'{part}.npz', images=scans, labels=np.arange(40) % 10)
        write_coco(root / 'digits', names, size=(128, 128), ann_file=f'annotations/{part}.json', img=f'images/{part}')
    return root


@pytest.fixture
def run_folder(data, tmp_path, monkeypatch):
    """The current folder, from which checkpoints are found, with the data sets where the environment says."""
    for name in ('imagenet', 'cifar10', 'cifar100', 'digits'):
        monkeypatch.setenv(f'{name.upper()}_ROOT', f'{data / name}/')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Random weights of the full-size teachers, each written once."""
    folder = tmp_path_factory.mktemp('teachers')

    def write(teacher):
        path = folder / Path(teacher.checkpoint).name
        if not path.is_file():
            torch.manual_seed(0)
            net = timm.create_model(teacher.timm) if 'timm' in teacher else CifarResNet(**teacher.options)
            torch.save(net.state_dict(), path)
        return path

    return write


def options(config):
    """Where a config keeps its ``teacher`` and ``terms``."""
    return config.model.distill if 'distill' in config.model else config.default_hooks.distill


def prepare(path, run_folder, weights):
    """One iteration of a recipe on its own data with four images; nothing of the model or the distillation differs."""
    config = Config.fromfile(path)
    checkpoint = Path(options(config).teacher.checkpoint)
    checkpoint.parent.mkdir(exist_ok=True)
    if not checkpoint.exists():
        checkpoint.symlink_to(weights(options(config).teacher))
    loader = {**config.train_dataloader, 'batch_size': 4, 'num_workers': 0, 'persistent_workers': False}
    config.visualizer = dict(type='Visualizer')
    config = short_run(config, run_folder / path.stem, loader, epochs=None)
    config.train_dataloader.pin_memory = False
    config.default_hooks.checkpoint = None
    return config


def distiller_of(runner):
    return next(h for h in runner.hooks if type(h).__name__ == 'DistillHook').session


# ---------------------------------------------------------------------- what the files say
def test_every_recipe_is_listed():
    assert {p.stem for p in RECIPES} == set(PAIRS)


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_recipe_is_short_and_names_official_files(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 15
    assert 'umbers have not been run here' in text
    config = Config.fromfile(path)
    # --cfg-options there would change nothing.
    assert not {'teacher', 'terms', 'distill', 'loss', 'attention', 'student', 'pixels', 'weight'} & set(config)
    teacher = options(config).teacher
    folder, name = teacher.checkpoint.split('/')
    assert folder == 'checkpoints'
    if 'timm' in teacher:
        address = re.search(r'^# Teacher: (https://\S+)$', text, flags=re.MULTILINE).group(1)
        pretrained = timm.get_pretrained_cfg(teacher.timm, allow_unregistered=False)
        assert address == pretrained.url and address.endswith(f'/{name}')
        assert pretrained.input_size == (3, 224, 224)  # the students' resolution


def test_recipes_are_those_of_the_papers():
    """What makes the published numbers; see the sources in the files."""
    config = Config.fromfile(CONFIGS / 'cls' / 'deit_tiny_token_regnety_160_imagenet.py')
    assert config.train_cfg.max_epochs == 300 and config.auto_scale_lr.base_batch_size == 8 * 128 == 1024
    assert config.optim_wrapper.optimizer == dict(type='AdamW', lr=5e-4 * 1024 / 512, weight_decay=0.05)
    assert config.model.mixup == dict(mixup_alpha=0.8, cutmix_alpha=1.0) and config.model.drop_path_rate == 0.1
    assert config.model.random_erasing == dict(probability=0.25, mode='pixel') and config.model.label_smoothing == 0.1
    assert config.train_dataloader.dataset.transform.auto_augment == 'rand-m9-mstd0.5-inc1'
    assert config.default_hooks.distill.alpha == 0.5
    config = Config.fromfile(CONFIGS / 'cls' / 'resnet18_dkd_resnet34_imagenet.py')
    assert config.train_cfg.max_epochs == 100 and config.param_scheduler[0].milestones == [30, 60, 90]
    assert config.optim_wrapper.optimizer == dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert config.auto_scale_lr.base_batch_size == 8 * config.train_dataloader.batch_size == 256
    config = Config.fromfile(CONFIGS / 'cls' / 'resnet8x4_dkd_resnet32x4_cifar100.py')
    assert config.train_cfg.max_epochs == 240 and config.param_scheduler[0].milestones == [150, 180, 210]
    assert config.optim_wrapper.optimizer == dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4)
    assert config.train_dataloader.batch_size == 64 and config.default_hooks.distill.alpha is None


# ---------------------------------------------------------------------- that they train
@pytest.mark.long
@pytest.mark.parametrize('path', [p for p in RECIPES if '_stage' not in p.stem], ids=lambda p: p.stem)
def test_recipe_trains_one_step(path, run_folder, weights):
    student_size, teacher_size, form = PAIRS[path.stem]
    config = prepare(path, run_folder, weights)
    watch, runner = train(config, Watch(stop_after=1))

    model, distiller = runner.model, distiller_of(runner)
    assert type(model).__name__ == ('Distilled' if form == 'model' else '') + 'TimmClassifier'
    assert sum(p.numel() for p in model.net.parameters()) / 1e6 == pytest.approx(student_size, abs=0.06)
    assert distiller.teacher.parameters_count / 1e6 == pytest.approx(teacher_size, abs=0.06)
    assert distiller.classes == {'': None}  # the same on both sides

    (losses,) = watch.losses
    terms = [f'loss_kd_{name}' for name in options(config).terms]
    assert terms and all(0 < losses[term] < float('inf') for term in terms)
    assert losses['kd_ratio'] > 0
    assert watch.steps == 1
    assert watch.gradients and all(torch.isfinite(g).all() for g in watch.gradients.values())
    if form == 'model':
        assert any(n.startswith('kd_adapters') and g.abs().sum() > 0 for n, g in watch.gradients.items())


@pytest.mark.long
def test_two_stages(run_folder, weights):
    """The first trains everything but the classifier, and not on labels; the second starts from it."""
    first, second = (CONFIGS / 'cls' / f'resnet50_stage{i}_deit_base_imagenet.py' for i in (1, 2))
    config = prepare(first, run_folder, weights)
    config.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1, filename_tmpl='epoch_30.pth')
    config.work_dir = str(run_folder / Path(STAGE_1).parent)
    watch, runner = train(config, Watch(stop_after=1))
    (losses,) = watch.losses
    assert {k for k in losses if k.startswith('loss_kd')} == {'loss_kd_stage', 'loss_kd_attention'}
    assert all(losses[k] > 0 for k in losses if k.startswith('loss_kd'))
    assert losses['loss_cls'] == 0  # what labels say
    assert not any(n.startswith('net.fc') for n in watch.gradients) and 'net.conv1.weight' in watch.gradients

    config = prepare(second, run_folder, weights)
    assert config.load_from == STAGE_1
    config.optim_wrapper.optimizer.lr = 0.0
    watch, runner = train(config, Watch(stop_after=1))
    stored = find_weights(load_checkpoint(STAGE_1), STAGE_1)[0]
    started = {k: v for k, v in runner.model.state_dict().items() if 'running' not in k and 'num_batches' not in k}
    assert started and all(torch.equal(v, stored[k]) for k, v in started.items())
    assert {k for k in watch.losses[0] if k.startswith('loss_kd')} == {'loss_kd_stage', 'loss_kd_logits'}
    assert 'net.fc.weight' in watch.gradients


# Students and teachers without distillation: every plain config trains and is evaluated.
PLAIN = {
    'cifar10_resnet_teacher': (2.8, 'accuracy/top1'),
    'cifar10_deit_student': (0.2, 'accuracy/top1_distillation_head'),
    'cifar10_vit_teacher': (0.5, 'accuracy/top1'),
    'cifar10_resnet_student': (0.3, 'accuracy/top1'),
    'resnet8x4_cifar100': (1.2, 'accuracy/top5'),
    'resnet32x4_cifar100': (7.4, 'accuracy/top5'),
    'digits_multilabel_teacher': (2.8, 'multi_label/mAP'),
    'digits_multilabel_student': (0.1, 'multi_label/mAP'),
}


def one_epoch(name, run_folder, monkeypatch, *arguments):
    """The finished Runner of ``tools/train.py`` on four images."""
    finished = []
    original = Runner.train
    monkeypatch.setattr(Runner, 'train', lambda self: finished.append(self) or original(self))
    edits = [
        f'{part}_dataloader.{key}' for part in ('train', 'val') for key in ('num_workers=0', 'persistent_workers=False')
    ]
    edits += ['train_dataloader.batch_size=4', 'train_cfg.max_epochs=1', 'log_level=WARNING']
    path = CONFIGS / 'cls' / f'{name}.py'
    cli.train([str(path), '--work-dir', str(run_folder / 'work'), *arguments, '--cfg-options', *edits])
    return finished[0]


@pytest.mark.parametrize('name', PLAIN)
def test_plain_config(name, run_folder, monkeypatch):
    size, metric = PLAIN[name]
    runner = one_epoch(name, run_folder, monkeypatch)
    assert sum(p.numel() for p in runner.model.parameters()) / 1e6 == pytest.approx(size, abs=0.05)
    assert runner.iter == 1
    values = runner.message_hub.log_scalars[f'val/{metric}'].data[0]
    assert len(values) == 1 and 0 <= values[0] <= 100


# (recipe, student, teacher, edit of the teacher, its terms).
TAUGHT = [
    ('kl', 'cifar10_resnet_student', 'cifar10_resnet_teacher', '', {'logits'}),
    ('dkd', 'cifar10_resnet_student', 'cifar10_resnet_teacher', '', {'logits'}),
    ('dist', 'cifar10_resnet_student', 'cifar10_resnet_teacher', '', {'logits'}),
    ('deit_token', 'cifar10_deit_student', 'cifar10_resnet_teacher', '', {'token'}),
    ('vit_feature', 'cifar10_resnet_student', 'cifar10_vit_teacher', '', {'logits', 'last', 'before'}),
    ('vit_feature', 'cifar10_deit_student', 'cifar10_resnet_teacher', '', {'logits', 'last', 'before'}),
    ('ofa', 'cifar10_resnet_student', 'cifar10_vit_teacher', '', {'logits', 'last', 'before'}),
    ('vit_attention', 'cifar10_resnet_student', 'cifar10_vit_teacher', 'depth=12', {'logits', 'attention'}),
    ('multi_label', 'digits_multilabel_student', 'digits_multilabel_teacher', '', {'logits'}),
]


@pytest.mark.parametrize('recipe, student, teacher, edit, terms', TAUGHT, ids=lambda v: v if isinstance(v, str) else '')
def test_recipe_from_the_command_line(recipe, student, teacher, edit, terms, run_folder, monkeypatch):
    path = run_folder / 'teacher.py'
    path.write_text(f'_base_ = {str(CONFIGS / "cls" / teacher)!r} + ".py"\nmodel = dict({edit})\n')
    torch.manual_seed(0)
    torch.save(dict(state_dict=build(Config.fromfile(path)).state_dict()), 'teacher.pth')
    arguments = ['--kd', recipe, '--teacher', str(path), '--teacher-checkpoint', 'teacher.pth']
    runner = one_epoch(student, run_folder, monkeypatch, *arguments)
    assert set(distiller_of(runner).terms) == terms
    logged = {k.removeprefix('train/'): v.data[0] for k, v in runner.message_hub.log_scalars.items() if '/loss_kd' in k}
    assert set(logged) == {f'loss_kd_{t}' for t in terms}
    assert all(len(values) == 1 and 0 < values[0] < float('inf') for values in logged.values())


POLICY = ('progressive', 'annealing', 'born_again', 'patient', 'ema', 'multi_teacher', 'long_tail')


@pytest.mark.long
@pytest.mark.parametrize('name', POLICY)
def test_policy(name, run_folder, monkeypatch):
    """Every config that shows a recipe of policy trains, with the teachers where it says, stages included."""
    given = Config.fromfile(CONFIGS / 'cls' / f'digits_{name}.py').default_hooks.distill
    assert given.recipe == name
    for teacher in given.get('teachers', dict(one=given.get('teacher'))).values():
        if 'config' in teacher:
            Path(teacher.checkpoint).parent.mkdir(parents=True, exist_ok=True)
            config = Config.fromfile(resolve_config(teacher.config))
            torch.save(dict(state_dict=build(config).state_dict()), teacher.checkpoint)
    finished = []
    original = Runner.train
    monkeypatch.setattr(Runner, 'train', lambda self: finished.append(self) or original(self))
    edits = [f'{p}_dataloader.{key}' for p in ('train', 'val') for key in ('num_workers=0', 'persistent_workers=False')]
    edits += ['train_dataloader.batch_size=4', 'train_cfg.max_epochs=4', 'train_cfg.val_interval=4']
    cli.train([str(CONFIGS / 'cls' / f'digits_{name}.py'), '--work-dir', 'work', '--cfg-options', *edits])
    (runner,) = finished
    hook = next(h for h in runner.hooks if type(h).__name__ == 'DistillHook')
    on = [{k for k, v in row.items() if k.startswith('loss_kd') and v > 0} for row in hook.history]
    expected = {
        'progressive': [{'loss_kd_features'}, *[{'loss_kd_logits'}] * 3],
        'annealing': [*[{'loss_kd_logits'}] * 3, set()],
    }
    assert on == expected.get(name, [{'loss_kd_logits'}] * 4)


# ---------------------------------------------------------------------- the CIFAR ResNets
def test_cifar_resnet_is_the_tables_network():
    """Size, grids and names of mdistiller's resnet8x4 and resnet32x4."""
    sizes = {depth: sum(p.numel() for p in CifarResNet(depth).parameters()) for depth in (8, 32)}
    assert sizes == {8: 1_233_540, 32: 7_433_860}
    # He et al., table 6: 0.27 M and 0.46 M for ten classes; a little more with convolutions as shortcuts.
    for depth, millions in ((20, 0.27), (32, 0.46), (110, 1.73)):
        net = CifarResNet(depth, num_classes=10, channels=(16, 16, 32, 64))
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    net = CifarResNet(14, num_classes=7)
    grids = {}
    for i in (1, 2, 3):
        layer = net.get_submodule(f'layer{i}')
        layer.register_forward_hook(lambda m, inputs, output, i=i: grids.update({i: tuple(output.shape[1:])}))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert grids == {1: (64, 32, 32), 2: (128, 16, 16), 3: (256, 8, 8)}
    block = ('conv1.weight', 'bn1.weight', 'bn1.bias', 'conv2.weight', 'bn2.weight', 'bn2.bias')
    names = [f'layer{i}.{j}.{n}' for i in (1, 2, 3) for j in (0, 1) for n in block]
    names += [f'layer{i}.0.downsample.{n}' for i in (1, 2, 3) for n in ('0.weight', '1.weight', '1.bias')]
    names += ['conv1.weight', 'bn1.weight', 'bn1.bias', 'fc.weight', 'fc.bias']
    assert {n for n, _ in net.named_parameters()} == set(names)


@pytest.mark.parametrize(
    'options', [dict(depth=18), dict(depth=2), dict(depth='32x4'), dict(depth=8, channels=(16, 32))]
)
def test_cifar_resnet_refuses(options):
    with pytest.raises(DistillError, match=r'depth must be 6n \+ 2|channels are'):
        CifarResNet(**options)
