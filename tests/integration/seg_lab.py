"""What the real runs of segmentors share: tiny pictures with label maps, and mmseg's own configs made small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image, ImageDraw
from torch import nn

from kd_plugins.config_files import resolve_config
from tests.integration.lab import Lab
from tests.integration.promises import Case

CLASSES = ('ground', 'circle', 'square', 'bar')
SIZE = 64  # longer side of the images, in pixels
IMAGES = 8  # of different shapes, so that batches are padded
IGNORED = 255

_BN = "norm_cfg=dict(type='BN')"
_INPUT = "pretrained=None, data_preprocessor=dict(size=None, size_divisor=32), test_cfg=dict(mode='whole')"
_RESNET = f'backbone=dict(base_channels={{w}}, stem_channels={{w}}, {_BN})'
_AUXILIARY = f'auxiliary_head=dict(in_channels={{w}} * 4, channels=8, num_classes={{classes}}, {_BN})'


def _dilated(head: str) -> str:
    return (
        f'model = dict({_INPUT}, {_RESNET}, {_AUXILIARY},\n'
        f'    decode_head=dict(in_channels={{w}} * 8, channels=16, num_classes={{classes}}, {_BN}{head}))\n'
    )


def _base(path: str) -> str:
    return resolve_config(f'mmseg::{path}')


_MODELS = {
    'fcn': (_base('fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py'), _dilated('')),
    'pspnet': (_base('pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'), _dilated('')),
    'deeplab': (
        _base('deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py'),
        _dilated(', c1_in_channels={w}, c1_channels=8'),
    ),
    'upernet': (
        _base('upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py'),
        f'model = dict({_INPUT}, {_RESNET}, {_AUXILIARY}, decode_head=dict(\n'
        f'    in_channels=[{{w}}, {{w}} * 2, {{w}} * 4, {{w}} * 8], channels=16, num_classes={{classes}}, {_BN}))\n',
    ),
    'segformer': (
        _base('segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py'),
        f'model = dict({_INPUT}, backbone=dict(embed_dims={{w}}, num_layers=[1, 1, 1, 1], init_cfg=None),\n'
        f'    decode_head=dict(in_channels=[{{w}}, {{w}} * 2, {{w}} * 5, {{w}} * 8], channels=16,\n'
        f'        num_classes={{classes}}, {_BN}))\n',
    ),
    'ocr': (
        _base('ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py'),
        f'stage = dict(num_classes={{classes}}, {_BN}, dropout_ratio=0.1, align_corners=False)\n'
        f'model = dict({_INPUT}, backbone=dict(depth=18, base_channels={{w}}, stem_channels={{w}}, {_BN}),\n'
        "    decode_head=[dict(type='FCNHead', in_channels={w} * 4, in_index=2, channels=8, num_convs=1,\n"
        '        concat_input=False, **stage),\n'
        "    dict(type='OCRHead', in_channels={w} * 8, in_index=3, channels=16, ocr_channels=8, **stage)])\n"
        'del stage\n',
    ),
}

_RUN = """
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
dataset = dict(
    _delete_=True, type='BaseSegDataset', data_root='{root}/', img_suffix='.png', seg_map_suffix='.png',
    data_prefix=dict(img_path='images', seg_map_path='labels'), metainfo=dict(classes={names}), pipeline=pipeline)
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset,
    sampler=dict(type='InfiniteSampler', shuffle=True))
val_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False,
    dataset=dict(**{{**dataset, 'pipeline': test_pipeline}}, test_mode=True))
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=4, val_interval=1000)
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4))
param_scheduler = [dict(type='LinearLR', start_factor=0.2, by_epoch=False, begin=0, end=6)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=100))
custom_hooks = [
    dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.01, update_buffers=True, priority=49)]
auto_scale_lr = dict(enable=False, base_batch_size=2)
env_cfg = dict(dist_cfg=dict(backend='gloo'))
vis_backends = []
visualizer = dict(vis_backends=[])
randomness = dict(seed=0)
"""

LOGITS = dict(loss=dict(type='PixelwiseKLDivLoss'), student='decode_head', teacher='decode_head')
FEATURES = dict(loss=dict(type='FeatureMSELoss'), student='backbone[2]', teacher='backbone[2]')
NORMED = {**FEATURES, 'adapter': dict(type='auto', norm=True)}
CWD = {**LOGITS, 'loss': dict(type='ChannelWiseDivLoss')}
MGD = dict(loss=dict(type='MGDLoss'), student='backbone[3]', teacher='backbone[3]')

# Neither dropout nor flips, whose generators MMEngine does not restore.
DETERMINISTIC = """
for part in ('decode_head', 'auxiliary_head'):
    model[part]['dropout_ratio'] = 0.0
pipeline[2]['prob'] = 0.0
train_dataloader['dataset']['pipeline'][2]['prob'] = 0.0
del part
"""
# Results depend neither on how images are spread over batches nor on how often a forward is run.
GROUP_NORM = """
for part in ('backbone', 'decode_head', 'auxiliary_head'):
    model[part]['norm_cfg'] = dict(_delete_=True, type='GN', num_groups=2)
del part
"""


class SegLab(Lab):
    """Writes and runs configs of segmentors, see `Lab`."""

    NAME = 'segmentation'
    BF16 = 0.05
    FRAMEWORK = 'mmseg'
    METRIC = 'mIoU'
    TTA = 'SegTTAModel'
    MODELS = _MODELS
    RUN = _RUN
    CLASSES = CLASSES
    SIZE = SIZE
    HEADS = ('decode_head.conv_seg.weight', 'auxiliary_head.conv_seg.weight')

    @staticmethod
    def write_data(root: Path) -> None:
        """Shapes on a ground, with a border that is ignored."""
        rng = np.random.default_rng(0)
        for folder in ('images', 'labels'):
            (root / folder).mkdir(parents=True)
        for index in range(IMAGES):
            side = int(rng.integers(40, SIZE))
            width, height = (SIZE, side) if index % 2 else (side, SIZE)
            picture = Image.fromarray(rng.integers(90, 130, (height, width, 3), dtype=np.uint8))
            labels = Image.new('L', (width, height), 0)
            for _ in range(3):
                kind, size = int(rng.integers(3)), int(rng.integers(14, 26))
                x, y = int(rng.integers(0, width - size)), int(rng.integers(0, height - size))
                box = (x, y, x + size, y + (size // 2 if kind == 2 else size))
                colour = tuple(int(c) for c in rng.integers(0, 255, 3))
                for image, fill in ((picture, colour), (labels, kind + 1)):
                    draw = ImageDraw.Draw(image)
                    (draw.ellipse if kind == 0 else draw.rectangle)(box, fill=fill)
            ImageDraw.Draw(labels).rectangle((0, 0, 3, height), fill=IGNORED)
            picture.save(root / 'images' / f'{index}.png')
            labels.save(root / 'labels' / f'{index}.png')

    def file(self, family: str = 'fcn', width: int = 8, extra: str = '', classes: int | None = None) -> Path:
        """See `Lab.file`; ``width`` channels leave the first stage of the backbone."""
        return super().file(family, width, extra, classes)

    def plain(self, family: str = 'fcn', *, steps: int | None = None, **options: Any) -> Config:
        """See `Lab.plain`; runs are iteration-based, 4 iterations by default."""
        return super().plain(family, steps=4 if steps is None else steps, **options)

    def teacher(self, family: str = 'fcn', width: int = 16, **options: Any) -> dict:
        """See `Lab.teacher`."""
        return super().teacher(family, width, **options)

    @staticmethod
    def tta(config: Config) -> Config:
        """See `Lab.tta`: mmseg's own with one size instead of six."""
        config.tta_pipeline[1].transforms[0] = [dict(type='Resize', scale_factor=1.5, keep_ratio=True)]
        return config

    @classmethod
    def assert_metrics(cls, metrics: dict[str, float], case: Case) -> None:
        """What a test measures is possible."""
        assert 0 <= metrics[cls.METRIC] <= 100

    @staticmethod
    def slack(adapters: int) -> dict[str, float]:
        """See `Lab.slack`."""
        return dict(rel=0.02)

    @staticmethod
    def taps(teacher: Any) -> tuple[str, ...]:
        """See `Lab.taps`."""
        last = '.1' if isinstance(teacher.model.decode_head, nn.ModuleList) else ''
        return 'backbone', f'decode_head{last}'

    @staticmethod
    def hook_form(config: Config, teacher: dict, terms: dict | None = None, **options: Any) -> Config:
        """See `Lab.hook_form`."""
        return Lab.hook_form(config, teacher, terms or dict(logits=LOGITS), **options)

    @staticmethod
    def model_form(config: Config, teacher: dict, terms: dict | None = None, **options: Any) -> Config:
        """See `Lab.model_form`."""
        return Lab.model_form(config, teacher, terms or dict(features=FEATURES), **options)
