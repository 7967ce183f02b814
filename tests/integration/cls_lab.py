"""What the real runs of classifiers share: tiny pictures in folders, and timm's models made small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image, ImageDraw
from torch import nn

from tests.integration.lab import Lab
from tests.integration.promises import Case

CLASSES = ('bar', 'circle', 'cross', 'square')  # sorted, as folders are
SIZE = 32  # side of the images, in pixels
IMAGES = 4  # of every class and split

# Small models of timm; the number is the width. `deit` has a distillation token.
_MODELS = {
    'resnet': "model = dict(model='resnet18', layers=(1, 1, 1, 1), channels=({w}, {w} * 2, {w} * 4, {w} * 8), "
    'output_stride=8{classes})\n',
    'deit': "model = dict(model='deit_tiny_distilled_patch16_224', patch_size=8, embed_dim={w} * 4, depth=4, "
    'num_heads=2{classes})\n',
    'vit': "model = dict(model='vit_tiny_patch16_224', patch_size=8, embed_dim={w} * 4, depth=4, num_heads=2"
    '{classes})\n',
    # Neither dropout nor statistics of a batch, and random depth in training.
    'convnext': "model = dict(model='convnext_atto', depths=(1, 1, 1, 1), dims=({w}, {w} * 2, {w} * 4, {w} * 8), "
    'patch_size=2, drop_path_rate=0.1{classes})\n',
}
_RUN = """
model.update(type='kd_plugins.TimmClassifier', input_size={size})
default_scope = 'mmengine'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
dataset = dict(type='kd_plugins.ImageFolder', root='{root}/images', classes={names},
               transform=[dict(type='RandomCrop', size={size}, padding=2), dict(type='RandomHorizontalFlip')])
train_dataloader = dict(batch_size=4, num_workers=0, dataset=dict(**dataset, split='train'),
                        sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(batch_size=5, num_workers=0, dataset=dict(**{{**dataset, 'transform': None}}, split='val'),
                      sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = dict(type='kd_plugins.Accuracy', topk=(1, 3))
test_evaluator = val_evaluator
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=100)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4))
param_scheduler = [dict(type='LinearLR', start_factor=0.2, by_epoch=False, begin=0, end=6)]
default_hooks = dict(logger=dict(type='LoggerHook', interval=1), checkpoint=dict(type='CheckpointHook', interval=100))
custom_hooks = [dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.01, update_buffers=True)]
env_cfg = dict(dist_cfg=dict(backend='gloo'))
randomness = dict(seed=0)
"""

LOGITS = dict(loss=dict(type='KLDivLoss'), student='logits', teacher='logits')
TOKEN = dict(loss=dict(type='HardLabelLoss'), student='dist_logits', teacher='logits')
FEATURES = dict(loss=dict(type='FeatureMSELoss'), student='stages[-1]', teacher='stages[-1]')
NORMED = {**FEATURES, 'adapter': dict(type='auto', norm=True)}
PROJECTED = dict(loss=dict(type='OFALoss'), student='stages[-2]', teacher='logits', adapter=dict(type='LogitProjector'))

# Draws from every generator there is, in the data set, in the data preprocessor and in the network.
AUGMENTED = """
model.update(drop_rate=0.1, drop_path_rate=0.2, label_smoothing=0.1, random_erasing=dict(probability=0.9, mode='pixel'),
             mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, mode='elem'))
train_dataloader['dataset']['transform'] = dict(
    model='vit_tiny_patch16_224', input_size=32, training=True, auto_augment='rand-m9-mstd0.5-inc1')
"""
# Draws from none, as MMEngine does not restore them.
DETERMINISTIC = "train_dataloader['dataset']['transform'] = None\n"


class ClsLab(Lab):
    """Writes and runs configs of classifiers, see `Lab`. A run has one epoch of 4 iterations."""

    NAME = 'classification'
    BF16 = 0.05
    METRIC = 'accuracy/top1'
    MODELS = _MODELS
    RUN = _RUN
    CLASSES = CLASSES
    SIZE = SIZE
    TRUNK = 'net'
    HEADS = ('net.head.weight', 'net.head_dist.weight')

    @staticmethod
    def write_data(root: Path) -> None:
        """``images/{train,val}/<class>/<n>.png``, shapes on noise."""
        rng = np.random.default_rng(0)
        for split in ('train', 'val'):
            for kind in CLASSES:
                folder = root / 'images' / split / kind
                folder.mkdir(parents=True)
                for index in range(IMAGES):
                    picture = Image.fromarray(rng.integers(90, 130, (SIZE, SIZE, 3), dtype=np.uint8))
                    _draw(ImageDraw.Draw(picture), kind, rng)
                    picture.save(folder / f'{index}.png')

    def file(self, family: str = 'resnet', width: int = 8, extra: str = '', classes: int | None = None) -> Path:
        """See `Lab.file`; ``width`` channels leave the first stage, four times as many a transformer's blocks."""
        count = len(self.CLASSES) if classes is None else classes
        names = self.CLASSES if count == len(self.CLASSES) else tuple(f'class{i}' for i in range(count))
        text = self.MODELS[family].format(w=width, classes=f', num_classes={count}')
        text += self.RUN.format(size=SIZE, root=self.root.as_posix(), names=names) + extra
        path = self.root / f'{family}_{width}_{next(self._numbers)}.py'
        path.write_text(text)
        return path

    def plain(self, family: str = 'resnet', **options: Any) -> Config:
        """See `Lab.plain`."""
        return super().plain(family, **options)

    def teacher(self, family: str = 'resnet', width: int = 16, **options: Any) -> dict:
        """See `Lab.teacher`."""
        return super().teacher(family, width, **options)

    @staticmethod
    def network(config: Config) -> dict[str, Any]:
        """The options with which timm itself builds the network of a config."""
        ours = ('type', 'model', 'input_size', 'label_smoothing', 'random_erasing', 'mixup')
        size = {} if 'resnet' in config.model.model else dict(img_size=SIZE)
        return {**{k: v for k, v in config.model.items() if k not in ours}, **size}

    def own_test(self, config: str, checkpoint: Path) -> tuple[Any, ...]:
        """See `Lab.own_test`: MMEngine's Runner, in which the model is built as the config says."""

        def run(arguments: list[str]) -> None:
            path, weights, _, work_dir, _, name = arguments
            loaded = Config.fromfile(path)
            loaded.update(load_from=weights, work_dir=work_dir, experiment_name=name.partition('=')[2])
            self.runner(loaded).test()

        return run, config, checkpoint

    @classmethod
    def assert_metrics(cls, metrics: dict[str, float], case: Case) -> None:
        """What a test measures is possible, and says how the heads of a token fare on their own."""
        assert 0 <= metrics[cls.METRIC] <= metrics['accuracy/top3'] <= 100
        assert (f'{cls.METRIC}_distillation_head' in metrics) == (case.family == 'deit')

    @staticmethod
    def slack(adapters: int) -> dict[str, float]:
        """See `Lab.slack`; every tensor has an entry in the archive."""
        return dict(rel=0.02, abs=1024 * adapters)

    @staticmethod
    def is_changed(model: nn.Module) -> bool:
        """See `Lab.is_changed`: where a token is taught, the labels teach the class head alone."""
        return Lab.is_changed(model) or model.separate_heads

    @staticmethod
    def taps(teacher: Any) -> tuple[str, ...]:
        """See `Lab.taps`."""
        return (teacher.head,)

    @staticmethod
    def hook_form(config: Config, teacher: dict, terms: dict | None = None, **options: Any) -> Config:
        """See `Lab.hook_form`."""
        return Lab.hook_form(config, teacher, terms or dict(logits=LOGITS), **options)

    @staticmethod
    def model_form(config: Config, teacher: dict, terms: dict | None = None, **options: Any) -> Config:
        """See `Lab.model_form`."""
        return Lab.model_form(config, teacher, terms or dict(features=FEATURES), **options)


def _draw(draw: ImageDraw.ImageDraw, kind: str, rng: np.random.Generator) -> None:
    side = int(rng.integers(10, 18))
    x, y = (int(rng.integers(2, SIZE - side - 2)) for _ in range(2))
    fill = tuple(int(c) for c in rng.integers(0, 255, 3))
    right, bottom, middle = x + side, y + side, side // 2
    if kind == 'circle':
        draw.ellipse((x, y, right, bottom), fill=fill)
    elif kind == 'cross':
        draw.line((x, y, right, bottom), fill=fill, width=4)
        draw.line((x, bottom, right, y), fill=fill, width=4)
    else:
        draw.rectangle((x, y, right, y + middle if kind == 'bar' else bottom), fill=fill)
