"""What the real runs share: a tiny COCO-style data set, small students and teachers, and ways to run them."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yapf.yapflib.yapf_api
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.dataset import base_dataset
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, OPTIM_WRAPPERS
from mmengine.runner import Runner
from PIL import Image, ImageDraw

REPO = Path(__file__).resolve().parents[2]
CLASSES = ('circle', 'square', 'bar')
SIZE = 96  # longer side of the images, in pixels
IMAGES = 8  # of different shapes, so that batches are padded

# Real mmdet configs, made small enough for a few steps in a second; the second number is the teacher's width.
_MODELS = {
    'yolox': (
        'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
        """model = dict(
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(widen_factor={w} / 64),
    neck=dict(in_channels=[{w} * 4, {w} * 8, {w} * 16], out_channels={w} * 4, num_csp_blocks=1),
    bbox_head=dict(num_classes={classes}, in_channels={w} * 4, feat_channels={w} * 4, stacked_convs=1))
""",
    ),
    'rtmdet': (
        'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
        """model = dict(
    data_preprocessor=dict(batch_augments=None, pad_size_divisor=32),
    backbone=dict(widen_factor={w} / 64, init_cfg=None, norm_cfg=dict(type='BN')),
    neck=dict(in_channels=[{w} * 4, {w} * 8, {w} * 16], out_channels={w} * 4, num_csp_blocks=1,
              norm_cfg=dict(type='BN')),
    bbox_head=dict(num_classes={classes}, in_channels={w} * 4, feat_channels={w} * 4, stacked_convs=1,
                   norm_cfg=dict(type='BN')))
""",
    ),
    'gfl': (
        'mmdet::gfl/gfl_r50_fpn_1x_coco.py',
        """model = dict(
    backbone=dict(depth=18, base_channels={w}, stem_channels={w}, frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[{w}, {w} * 2, {w} * 4, {w} * 8], out_channels=32),
    bbox_head=dict(num_classes={classes}, in_channels=32, feat_channels=32, stacked_convs=1, norm_cfg=None,
                   conv_cfg=None))
""",
    ),
}

_RUN = """
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=({size}, {size}), keep_ratio=True), dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=({size}, {size}), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
dataset = dict(
    _delete_=True, type='CocoDataset', data_root='{root}/', ann_file='annotations.json',
    data_prefix=dict(img='images/'), metainfo=dict(classes={names}), pipeline=pipeline)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(**{{**dataset, 'pipeline': test_pipeline}}, test_mode=True))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='{root}/annotations.json')
test_evaluator = val_evaluator
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1, val_interval=100)
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4))
param_scheduler = [dict(type='LinearLR', start_factor=0.2, by_epoch=False, begin=0, end=6)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=100))
custom_hooks = [dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.01, update_buffers=True, priority=49)]
auto_scale_lr = dict(enable=False, base_batch_size=2)
randomness = dict(seed=0)
"""

# Group normalisation: results depend neither on how images are spread over batches nor on how often a forward is run.
GROUP_NORM = """
for part in ('backbone', 'neck', 'bbox_head'):
    model[part]['norm_cfg'] = dict(_delete_=True, type='GN', num_groups=4)
del part
"""

# For gfl. Dropout 0.5 and drop path 0.9 in the backbone, BatchNorm in the neck: any of them active in a teacher would
# show at once, and a student that has them draws random numbers in every iteration.
DROPOUT = """
model['backbone'] = dict(
    _delete_=True, type='SwinTransformer', embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],
    window_size=7, drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.9, out_indices=(0, 1, 2, 3))
model['neck'] = dict(in_channels=[16, 32, 64, 128], out_channels=32, norm_cfg=dict(type='BN'))
"""

LOGITS = dict(loss=dict(type='YOLOLogitLoss'), student='bbox_head', teacher='bbox_head')
FEATURES = dict(loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck')


def skip_overhead() -> None:
    """Spare the runs of this process what costs more than a few iterations and changes none.

    Compilers are asked for their versions, configs formatted, hundreds of metafiles read for a ``_base_`` in a
    package, and garbage collected for every data set, through all that the frameworks have made.
    """
    torch.set_num_threads(1)
    Runner._log_env = lambda runner, env_cfg: None
    # MMEngine imports it where it uses it.
    yapf.yapflib.yapf_api.FormatCode = lambda text, **style: (text, True)
    config_utils._get_cfg_metainfo = functools.cache(config_utils._get_cfg_metainfo)
    base_dataset.gc = types.SimpleNamespace(collect=lambda: 0)


def keep_apart() -> None:
    """Give each run of this process a name of its own.

    MMEngine keeps loggers and message hubs by config and second; two runs within a second would share what they log.
    """
    setup, numbers = Runner.setup_env, itertools.count()

    def setup_env(runner: Runner, env_cfg: dict) -> None:
        setup(runner, env_cfg)
        runner._timestamp += f'_{next(numbers):04}'

    Runner.setup_env = setup_env


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """What AmpOptimWrapper does with ``dtype='bfloat16'``, on the CPU, where MMEngine refuses it."""

    @contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


class Probe(Hook):
    """Keeps the losses of every iteration and calls ``check(runner)`` after each.

    Attributes:
        logs: One dict of floats per iteration.
    """

    priority = 'LOWEST'

    def __init__(self, check=None) -> None:
        self.logs: list[dict[str, float]] = []
        self.check = check

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.logs.append({k: float(v) for k, v in outputs.items()})
        if self.check is not None:
            self.check(runner)


class Lab:
    """Writes configs and runs them.

    Args:
        root: An empty folder for data, configs and runs.
    """

    MODELS = _MODELS
    RUN = _RUN
    CLASSES = CLASSES

    def __init__(self, root: Path) -> None:
        self.root = root
        self._numbers = itertools.count()
        self._teachers: dict[Any, dict[str, str]] = {}
        self.write_data(root)

    @staticmethod
    def write_data(root: Path) -> None:
        """Pictures and their annotations."""
        _write_images(root)

    # ------------------------------------------------------------------ configs
    def file(self, family: str = 'yolox', width: int = 8, extra: str = '', classes: int | None = None) -> Path:
        """A config file on top of mmdet's own; ``width`` times 4 channels leave the first stage of a YOLO backbone."""
        classes = len(self.CLASSES) if classes is None else classes
        base, model = self.MODELS[family]
        text = f'_base_ = {base!r}\n' + model.format(w=width, classes=classes)
        names = self.CLASSES if classes == len(self.CLASSES) else tuple(f'class{i}' for i in range(classes))
        text += self.RUN.format(size=SIZE, root=self.root.as_posix(), names=names) + extra
        path = self.root / f'{family}_{width}_{next(self._numbers)}.py'
        path.write_text(text)
        return path

    def plain(self, family: str = 'yolox', *, steps: int | None = None, val: bool = False, **options: Any) -> Config:
        """A plain student's config with a work folder of its own.

        Args:
            family: ``'yolox'``, ``'rtmdet'`` or ``'gfl'``.
            steps: Iterations of an iteration-based run; None leaves the one epoch of 4 iterations.
            val: Whether validation stays configured.
            **options: ``width``, ``extra`` (text at the end of the file), and dotted keys with ``__`` for the dot, that
                are merged at the end.
        """
        config = Config.fromfile(self.file(family, options.pop('width', 4), options.pop('extra', '')))
        config.work_dir = str(self.root / f'run{next(self._numbers)}')
        # MMEngine keeps loggers and message hubs by name, and its own names have a resolution of one second.
        config.experiment_name = Path(config.work_dir).name
        if steps is not None:
            config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=1000)
            config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
            config.default_hooks.checkpoint.by_epoch = False
        if not val:
            config.val_cfg = config.val_dataloader = config.val_evaluator = None
            config.test_cfg = config.test_dataloader = config.test_evaluator = None
        config.merge_from_dict({k.replace('__', '.'): v for k, v in options.items()})
        return config

    def teacher(self, family: str = 'yolox', width: int = 8, *, extra: str = '', classes: int | None = None) -> dict:
        """``dict(config=, checkpoint=)`` of a bigger network with random, but not initial, weights."""
        key = (family, width, extra, classes)
        if key not in self._teachers:
            path = self.file(family, width, extra, classes)
            model = self.build(Config.fromfile(path), seed=7)
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor.add_(0.02 * torch.randn_like(tensor))
                for name, tensor in model.named_buffers():
                    if name.endswith('running_mean'):
                        tensor.add_(0.1 * torch.randn_like(tensor))
            checkpoint = path.with_suffix('.pth')
            torch.save(dict(state_dict=model.state_dict(), meta={}), checkpoint)
            self._teachers[key] = dict(config=str(path), checkpoint=str(checkpoint))
        return dict(self._teachers[key])

    @staticmethod
    def hook_form(config: Config, teacher: dict, terms: dict | None = None, **options: Any) -> Config:
        """The same run, distilled by the hook alone."""
        config = copy.deepcopy(config)
        terms = copy.deepcopy(terms or dict(logits=LOGITS))
        config.default_hooks.distill = dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms, **options)
        return _renamed(config, 'hook')

    @staticmethod
    def model_form(config: Config, teacher: dict, terms: dict | None = None, **options: Any) -> Config:
        """The same run with the model that carries adapters."""
        config = copy.deepcopy(config)
        terms = copy.deepcopy(terms or dict(features=FEATURES))
        distill = dict(teacher=teacher, terms=terms, **options)
        config.model = dict(
            config.model, type='kd_plugins.Distilled', student_type=config.model['type'], distill=distill
        )
        config.default_hooks.distill = dict(type='kd_plugins.DistillHook')
        return _renamed(config, 'model')

    def dump(self, config: Config, name: str = 'config.py') -> str:
        """Write a config for a child process; returns its path."""
        # Not in the work folder, where a run writes its own copy.
        path = Path(config.work_dir + '_config') / name
        path.parent.mkdir(parents=True, exist_ok=True)
        config.dump(path)
        return str(path)

    # ------------------------------------------------------------------ running
    @staticmethod
    def build(config: Config, seed: int = 0) -> torch.nn.Module:
        """A model with its initial weights."""
        torch.manual_seed(seed)
        with MODELS.switch_scope_and_registry(config.get('default_scope', 'mmdet')) as registry:
            model = registry.build(copy.deepcopy(config.model))
        model.init_weights()
        return model

    @staticmethod
    def runner(config: Config, *hooks: Hook) -> Runner:
        """A Runner that has not started."""
        runner = Runner.from_cfg(copy.deepcopy(config))
        for hook in hooks:
            runner.register_hook(hook)
        return runner

    def train(self, config: Config, *hooks: Hook) -> Runner:
        """Train in this process."""
        runner = self.runner(config, *hooks)
        runner.train()
        return runner

    @staticmethod
    def run(*command: str, cwd: Path | None = None, check: bool = True, **environment: str):
        """Run a Python script in a child process; its output, both streams together, is in ``stdout``."""
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=cwd or REPO,
            env={**os.environ, 'PYTHONPATH': str(REPO), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=800,
        )
        if check and done.returncode:
            raise AssertionError(f'{command} ended with {done.returncode}:\n{done.stdout[-4000:]}')
        return done


def _renamed(config: Config, suffix: str) -> Config:
    config.work_dir += suffix
    config.experiment_name += suffix
    return config


def distill_hook(runner: Runner):
    """The DistillHook of a run."""
    return next(h for h in runner.hooks if type(h).__name__ == 'DistillHook')


def ema(runner: Runner) -> torch.nn.Module:
    """The EMA copy of a run."""
    return next(h for h in runner.hooks if type(h).__name__ == 'EMAHook').ema_model


def weights(runner: Runner) -> dict[str, torch.Tensor]:
    """Parameters and buffers of student and EMA copy, without adapters."""
    model = getattr(runner.model, 'module', runner.model)
    state = {f'student.{k}': v.clone() for k, v in model.state_dict().items()}
    return {**state, **{f'ema.{k}': v.clone() for k, v in ema(runner).state_dict().items()}}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest deviation per key where two states are not bit-identical; keys of one side only are infinitely far."""
    far = {k: float('inf') for k in set(one) ^ set(other)}
    for key in set(one) & set(other):
        if not torch.equal(one[key], other[key]):
            far[key] = (one[key].double() - other[key].double()).abs().max().item()
    return far


def _write_images(root: Path) -> None:
    rng = np.random.default_rng(0)
    (root / 'images').mkdir(parents=True)
    images, boxes = [], []
    for index in range(IMAGES):
        width, height = (SIZE, int(rng.integers(60, SIZE))) if index % 2 else (int(rng.integers(60, SIZE)), SIZE)
        picture = Image.fromarray(rng.integers(90, 130, (height, width, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(picture)
        for _ in range(3):
            kind, side = int(rng.integers(3)), int(rng.integers(16, 32))
            x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
            w, h = (side, side // 2) if kind == 2 else (side, side)
            colour = tuple(int(c) for c in rng.integers(0, 255, 3))
            (draw.ellipse if kind == 0 else draw.rectangle)((x, y, x + w, y + h), fill=colour)
            boxes.append(
                dict(id=len(boxes), image_id=index, category_id=kind, bbox=[x, y, w, h], area=w * h, iscrowd=0)
            )
        picture.save(root / 'images' / f'{index}.png')
        images.append(dict(id=index, file_name=f'{index}.png', width=width, height=height))
    categories = [dict(id=i, name=n) for i, n in enumerate(CLASSES)]
    (root / 'annotations.json').write_text(json.dumps(dict(images=images, annotations=boxes, categories=categories)))
