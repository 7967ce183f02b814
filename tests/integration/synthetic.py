"""Tiny detection data and configs for real runs: random pictures with boxes, and detectors that train in a second."""

import itertools
import json
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner, save_checkpoint
from PIL import Image

from kd_plugins.config_files import resolve_config
from kd_plugins.mm.configs import plain_model, without_pretrained

COUNTER = itertools.count()


@contextmanager
def unformatted():
    """Dump configs as they are: formatting them is most of a short run's time (1 s per Runner)."""
    with mock.patch('yapf.yapflib.yapf_api.FormatCode', lambda text, **style: (text, False)):
        yield


def write_coco(folder, classes, images=4, size=(96, 96), boxes=3, ann_file='annotations.json', img='img'):
    """Random pictures with random boxes and a COCO file; the last image has no box.

    Args:
        folder: Where to write.
        classes: Class names; category ids start at 1.
        images: Number of images.
        size: ``(width, height)`` in pixels.
        boxes: Boxes per image.
        ann_file: Annotation file, relative to ``folder``.
        img: Image folder, relative to ``folder``.

    Returns:
        ``folder``.
    """
    rng = np.random.default_rng(0)
    folder = Path(folder)
    (folder / img).mkdir(parents=True, exist_ok=True)
    (folder / ann_file).parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    records, annotations = [], []
    for i in range(images):
        name = f'{i:012d}.jpg'
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / img / name)
        records.append(dict(id=i + 1, file_name=name, width=width, height=height))
        for _ in range(boxes if i < images - 1 else 0):
            w, h = rng.integers(16, width // 2), rng.integers(16, height // 2)
            x, y = rng.integers(0, width - w), rng.integers(0, height - h)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i + 1,
                    category_id=int(rng.integers(len(classes))) + 1,
                    bbox=[int(x), int(y), int(w), int(h)],
                    area=int(w * h),
                    iscrowd=0,
                )
            )
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
    content = dict(images=records, annotations=annotations, categories=categories)
    (folder / ann_file).write_text(json.dumps(content))
    return folder


def dataloader(folder, classes, size=96, batch_size=2, keep_empty=True, ann_file='annotations.json', img='img'):
    """A train dataloader config on :func:`write_coco`'s files, with a plain pipeline and no worker processes."""
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='Resize', scale=(size, size), keep_ratio=True),
        dict(type='Pad', size_divisor=32, pad_val=dict(img=(114.0, 114.0, 114.0))),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs'),
    ]
    dataset = dict(
        type='CocoDataset',
        data_root=str(folder),
        ann_file=ann_file,
        data_prefix=dict(img=img),
        metainfo=dict(classes=tuple(classes)),
        filter_cfg=dict(filter_empty_gt=not keep_empty),
        pipeline=pipeline,
        serialize_data=False,
    )
    return dict(batch_size=batch_size, num_workers=0, persistent_workers=False, dataset=dataset)


def short_run(config, work_dir, loader, epochs=1):
    """Turn a config into a run of ``epochs`` epochs on ``loader``, without validation; the rest stays as it is.

    With ``epochs=None`` the config's own number stays, for hooks that count from the end; see :func:`train`.
    """
    config.train_dataloader = {'sampler': dict(type='DefaultSampler', shuffle=False), **loader}
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator', 'test_dataloader', 'test_cfg', 'test_evaluator'):
        config[key] = None
    if epochs is not None:
        config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs)
    config.work_dir = str(work_dir)
    # Runners of one process would share visualizers (and files), those of the same second loggers as well.
    config.experiment_name = f'run{next(COUNTER)}'
    config.visualizer.update(name=config.experiment_name, vis_backends=[])
    config.log_level = 'WARNING'
    config.model = without_pretrained(config.model)
    return config


def yolox(num_classes, width=0.125):
    """A YOLOX of 0.1 M parameters, as a config without data."""
    config = Config.fromfile(_mmdet('yolox/yolox_tiny_8xb8-300e_coco.py'))
    channels = [int(256 * width), int(512 * width), int(1024 * width)]
    # It needs the data set of the mosaic pipeline, which is not used here.
    config.custom_hooks = [h for h in config.custom_hooks if h.type != 'YOLOXModeSwitchHook']
    model = config.model
    model.data_preprocessor.batch_augments = None
    model.backbone.widen_factor = width
    model.neck.update(in_channels=channels, out_channels=channels[0], num_csp_blocks=1)
    model.bbox_head.update(num_classes=num_classes, in_channels=channels[0], feat_channels=channels[0])
    return config


def resnet18(name, num_classes, feat_channels=64):
    """A ResNet-18 form of one of mmdet's FPN detectors, e.g. ``'gfl/gfl_r50_fpn_1x_coco.py'``."""
    config = Config.fromfile(_mmdet(name))
    config.model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    config.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=feat_channels)
    config.model.bbox_head.update(
        num_classes=num_classes, in_channels=feat_channels, feat_channels=feat_channels, stacked_convs=1
    )
    return config


def save_teacher(config, folder, classes=None, name='teacher', edit=None):
    """Write a config and a checkpoint with random weights for it.

    Args:
        config: The teacher's config.
        folder: Where to write ``<name>.py`` and ``<name>.pth``.
        classes: Names to store in the checkpoint, as the Runner does.
        name: Stem of both files.
        edit: ``edit(state_dict)`` changes the weights in place before they are saved.

    Returns:
        ``dict(config=, checkpoint=)``, the ``teacher`` option.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keep = {k: config[k] for k in ('model', 'default_scope') if k in config}
    with unformatted():
        Config(keep).dump(str(folder / f'{name}.py'))
    state = build(config).state_dict()
    if edit is not None:
        edit(state)
    meta = {} if classes is None else dict(dataset_meta=dict(classes=tuple(classes)))
    save_checkpoint(dict(meta=meta, state_dict=state), str(folder / f'{name}.pth'))
    return dict(config=str(folder / f'{name}.py'), checkpoint=str(folder / f'{name}.pth'))


def build(config):
    """The model of a config with the random weights it would start from (without them, outputs can overflow)."""
    with MODELS.switch_scope_and_registry(config.get('default_scope', 'mmdet')) as registry:
        model = registry.build(without_pretrained(plain_model(config.model)))
    model.init_weights()
    return model


class Watch(Hook):
    """Notes what a run logs and steps, without changing it.

    Attributes:
        losses: What every iteration logged, as numbers.
        gradients: Gradients at the last optimizer step, by parameter name.
        steps: Optimizer steps.

    Args:
        stop_after: End the run after this many epochs, whatever its config says.
    """

    def __init__(self, stop_after=None):
        self.stop_after = stop_after
        self.losses, self.gradients, self.steps = [], {}, 0

    def before_train(self, runner):
        def before_step(optimizer, args, kwargs):
            parts = [('', runner.model)]
            session = next((h.session for h in runner.hooks if type(h).__name__ == 'DistillHook'), None)
            if session is not None:
                parts.append(('kd_adapters.', session.bank))
            named = {prefix + n: p for prefix, part in parts for n, p in part.named_parameters()}
            self.gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
            self.steps += 1

        runner.optim_wrapper.optimizer.register_step_pre_hook(before_step)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({k: float(v.detach()) for k, v in outputs.items()})

    def after_train_epoch(self, runner):
        if runner.epoch + 1 == self.stop_after:
            runner.train_loop.stop_training = True


def train(config, watch=None):
    """Run a config in this process.

    Returns:
        ``(watch, runner)`` of the finished run.
    """
    watch = Watch() if watch is None else watch
    with unformatted():
        runner = Runner.from_cfg(config)
        # Before the distillation hook's start-up: nothing may be stepped when that refuses to start.
        runner.register_hook(watch, priority='HIGHEST')
        runner.train()
    return watch, runner


def _mmdet(path):
    return resolve_config(f'mmdet::{path}')
