"""What the real runs share: a tiny COCO-style data set, small students and teachers, and ways to run them."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import json
import types
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yapf.yapflib.yapf_api
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.dataset import base_dataset
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, OPTIM_WRAPPERS
from mmengine.runner import Runner, load_checkpoint
from PIL import Image, ImageDraw

from kd_plugins.teachers.base import ModelTeacher
from tests.integration.promises import Case, Record, Step, pickled_modules, read, run, tensors

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

# Flips are drawn from a generator that MMEngine does not restore.
DETERMINISTIC = """
pipeline[3]['prob'] = 0.0
train_dataloader['dataset']['pipeline'][3]['prob'] = 0.0
"""

LOGITS = dict(loss=dict(type='YOLOLogitLoss'), student='bbox_head', teacher='bbox_head')
FEATURES = dict(loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck')
NORMED = {**FEATURES, 'adapter': dict(type='auto', norm=True)}
EARLY = {**FEATURES, 'student': 'backbone[0]', 'teacher': 'backbone[0]'}
SCORES = dict(loss=dict(type='BinaryKLDivLoss'), student='bbox_head', teacher='bbox_head')


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


def session_of(runner: Runner):
    """The distillation of a run, None of a plain one."""
    return next((h.session for h in runner.hooks if type(h).__name__ == 'DistillHook'), None)


class Notes(Hook):
    """Fills a record during a run; see `Lab.record` for its options."""

    priority = 'LOWEST'

    def __init__(self, record: Record, lab: Lab, keep: bool = False, check: Any = None, before: Any = None) -> None:
        self.record, self.lab, self.keep, self.check, self.before = record, lab, keep, check, before
        self.image = torch.rand(2, 3, lab.SIZE, lab.SIZE, generator=torch.Generator().manual_seed(0))
        self.handles: list[Any] = []

    def before_train(self, runner) -> None:
        model, record = student_of(runner), self.record
        record.begin(session_of(runner))

        def saw(preprocessor, args, output):
            if preprocessor.training:
                record.inputs.append(output['inputs'].clone())

        def tapped(trunk, args):
            # Not the trunk's own mode: timm shows both heads of a token in that of training alone.
            record.tapped[model.training] += self.lab.is_changed(model)

        self.handles = [
            model.data_preprocessor.register_forward_hook(saw),
            getattr(model, self.lab.TRUNK).register_forward_pre_hook(tapped),
        ]
        if self.before is not None:
            self.before(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        step = self.lab.step(outputs)
        self.record.step(student_of(runner), step, self.image, self.lab.taps)
        if self.keep:
            self.record.states.append(weights(runner))
        if self.check is not None:
            self.check(runner)

    def before_val_epoch(self, runner) -> None:
        self.record.begin_validation()

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.record.end_validation(metrics)

    def after_train(self, runner) -> None:
        for handle in self.handles:
            handle.remove()


class Lab:
    """Writes configs and runs them.

    Args:
        root: An empty folder for data, configs and runs.
    """

    NAME = 'detection'
    MODELS = _MODELS
    RUN = _RUN
    CLASSES = CLASSES
    SIZE = SIZE
    TRUNK = 'backbone'  # what every forward of a student runs
    HEADS = ('bbox_head.multi_level_conv_cls.0.weight', 'bbox_head.multi_level_conv_reg.0.weight')

    def __init__(self, root: Path) -> None:
        self.root = root
        self._numbers = itertools.count()
        self._teachers: dict[Any, dict[str, str]] = {}
        self._records: dict[str, Record] = {}
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

    def teacher(
        self,
        family: str = 'yolox',
        width: int = 8,
        *,
        extra: str = '',
        classes: int | None = None,
        names: tuple[str, ...] | None = None,
    ) -> dict:
        """``dict(config=, checkpoint=)`` of a bigger network with random, but not initial, weights.

        Args:
            family: As in `plain`.
            width: As in `file`.
            extra: As in `file`.
            classes: As in `file`.
            names: What its classes are said to be.
        """
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
        return dict(self._teachers[key], **({} if names is None else dict(classes=names)))

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

    # ------------------------------------------------------------------ promises
    #: How far KD losses of a bf16 run may be from those of a float32 run.
    BF16 = 0.1
    session = staticmethod(session_of)
    #: What the losses of distillation are multiplied with in the total.
    scale = 1

    @staticmethod
    def is_tapped(case: Case) -> bool:
        """Whether the student's modules are tapped during a forward."""
        return True

    @staticmethod
    def is_changed(model: torch.nn.Module) -> bool:
        """Whether a student is not what it is without distillation."""
        return any('forward' in m.__dict__ for m in model.modules())

    @staticmethod
    def taps(teacher: ModelTeacher) -> tuple[str, ...]:
        """Modules of a teacher that show whether it is at rest: dropout and statistics are in or before them."""
        return 'neck', teacher.head

    def plain_of(self, case: Case) -> Config:
        """The plain run of a case."""
        return self.plain(case.family, **case.options)

    def distil(self, case: Case, config: Config | None = None, teacher: dict | None = None) -> Config:
        """The distilled run of a case; ``config`` and ``teacher`` instead of its own."""
        config = self.plain_of(case) if config is None else config
        teacher = self.teacher(**case.teacher) if teacher is None else teacher
        return getattr(self, case.form)(config, teacher, case.terms, **case.distill)

    def record(
        self,
        config: Config,
        *,
        keep: bool = False,
        check: Callable[[Runner], None] | None = None,
        before: Callable[[Runner], None] | None = None,
    ) -> Record:
        """Train in this process and note what happens.

        Args:
            config: Of the run.
            keep: Whether weights are kept after every iteration.
            check: ``check(runner)`` is called after each.
            before: ``before(runner)`` is called before the first.
        """
        record = Record()
        with record.counting():
            runner = self.runner(config, Notes(record, self, keep, check, before))
            runner.train()
        record.end()
        record.run, record.model, record.weights = runner, student_of(runner), weights(runner)
        record.optimized = [p for g in runner.optim_wrapper.param_groups for p in g['params']]
        record.files = sorted(Path(runner.work_dir).glob('*_[0-9].pth'))
        for average in [h.ema_model for h in runner.hooks if type(h).__name__ == 'EMAHook']:
            record.averaged, record.updates = average.module, int(average.steps)
        return record

    def once(self, config: Config, **options: Any) -> Record:
        """`record`, but for configs that differ in nothing but where they are run the same record."""
        content = {k: v for k, v in config.to_dict().items() if k not in ('work_dir', 'experiment_name')}
        key = repr(content)
        if key not in self._records:
            self._records[key] = self.record(config, **options)
        return self._records[key]

    def pair(self, case: Case) -> tuple[Record, Record]:
        """The plain run of a case and its distilled one, trained once each."""
        return self.once(self.plain_of(case)), self.once(self.distil(case))

    @staticmethod
    def step(log: Mapping[str, Any]) -> Step:
        """What an iteration logged, by what it is."""
        values = {k: float(v) for k, v in log.items()}
        kd = {k: v for k, v in values.items() if 'kd' in k}
        return Step(values['loss'], {k: v for k, v in values.items() if k not in kd and k != 'loss'}, kd)

    @staticmethod
    def adapter_groups(runner: Runner) -> list[tuple[float, float]]:
        """Rates and decays with which adapters are trained; none where nothing is."""
        session = session_of(runner)
        optimizer = session and session.optimizer
        return [(g['lr'], g['weight_decay']) for g in optimizer.own.param_groups] if optimizer else []

    @staticmethod
    def predictions(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
        """What a student says of images."""
        return tensors(model(images))

    @staticmethod
    def files(teacher: Mapping[str, Any]) -> list[str]:
        """The files of a teacher."""
        return [teacher['config'], teacher['checkpoint']]

    # What test_scripts.py asks for.
    FRAMEWORK = 'mmdet'
    METRIC = 'coco/bbox_mAP'
    TTA = 'DetTTAModel'

    @property
    def tools(self) -> Path:
        """The framework's own scripts."""
        return Path(importlib.import_module(self.FRAMEWORK).__file__).parent / '.mim' / 'tools'

    def own_test(self, config: str, checkpoint: Path) -> tuple[Any, ...]:
        """What tests a config in the framework's own way, and its arguments."""
        return self.tools / 'test.py', config, checkpoint

    @staticmethod
    def tta(config: Config) -> Config:
        """The config with a test-time augmentation of a few small images."""
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
        resize = dict(type='Resize', scale=(SIZE, SIZE), keep_ratio=True)
        boxes, pack = dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs', meta_keys=keys)
        transforms = [[resize], flips, [boxes], [pack]]
        config.tta_pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=transforms)]
        return config

    def interrupted(self, config: Config, iteration: int) -> Config:
        """Train until an iteration ends, and return what resumes."""
        config = self.named(config, '_interrupted')

        def die(runner: Runner) -> None:
            if runner.iter + 1 == iteration:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.record(config, check=die)
        config.resume, config.experiment_name = True, config.experiment_name + '_resumed'
        return config

    def as_written(self, config: Config) -> Config:
        """The config as a child process reads it: MMEngine sorts what it writes, and the order of terms is that of
        the summands of a loss."""
        return Config.fromfile(self.dump(config))

    def in_child(self, config: Config, suffix: str) -> Config:
        """A copy for a child process, with the hooks that only these have."""
        config = self.named(config, suffix)
        config.custom_imports = dict(imports=['tests.integration.child_hooks'], allow_failed_imports=False)
        return config

    @staticmethod
    def named(config: Config, suffix: str) -> Config:
        """A copy under a name of its own."""
        return _renamed(copy.deepcopy(config), suffix)

    # What the promises of a checkpoint ask for.
    #: Entries that a run has which trains more than its student.
    EXTRA = frozenset({'kd_plugins'})
    #: How a process without this package opens files.
    OPEN = "import torch\nassert all(torch.load(f, weights_only=False)['state_dict'] for f in files)"

    @staticmethod
    def saved(path: Path) -> dict[str, dict[str, torch.Tensor]]:
        """The state dicts in a checkpoint."""
        content = read(path)
        return {k: content[k] for k in ('state_dict', 'ema_state_dict')}

    @staticmethod
    def entries(path: Path) -> set[str]:
        """What a checkpoint holds."""
        return set(read(path))

    @staticmethod
    def saved_adapters(record: Record) -> dict[str, torch.Tensor]:
        """What a run saved of what it trained besides its student."""
        return read(record.files[-1])['kd_plugins']['adapters']

    @classmethod
    def assert_size(cls, path: Path, plain: Path) -> None:
        """A checkpoint has the size of a plain run's and that of its adapters and their momentum."""
        adapters = read(path).get('kd_plugins', {}).get('adapters', {})
        size = path.stat().st_size - 2 * 4 * sum(v.numel() for v in adapters.values())
        assert size == pytest.approx(plain.stat().st_size, **cls.slack(len(adapters)))

    @staticmethod
    def slack(adapters: int) -> dict[str, float]:
        """How far off a size may be, by the number of tensors that are saved besides."""
        return dict(rel=0.01)

    @staticmethod
    def traces(path: Path) -> list[str]:
        """Names of this package for which a checkpoint would need it."""
        found = pickled_modules(path)
        assert 'torch._utils' in found
        return [m for m in found if m.startswith(('kd_plugins', 'tests'))]

    def load(self, path: Path, case: Case) -> torch.nn.Module:
        """A plain student with a checkpoint's weights, loaded as strictly as the framework can."""
        model = self.build(self.plain_of(case), seed=3)
        load_checkpoint(model, str(path), strict=True)
        return model.eval()

    def served(self, case: Case, record: Record) -> torch.nn.Module:
        """What is built from the distilled config for a test, with the weights of its last checkpoint."""
        model = self.build(self.distil(case))
        load_checkpoint(model, str(record.files[-1]), strict=True)
        return model.eval()

    def stored_teacher(self, case: Case) -> dict[str, torch.Tensor]:
        """The weights in the file of a case's teacher."""
        return read(self.teacher(**case.teacher)['checkpoint'])['state_dict']

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

    run = staticmethod(run)


def _renamed(config: Config, suffix: str) -> Config:
    config.work_dir += suffix
    config.experiment_name += suffix
    return config


def distill_hook(runner: Runner):
    """The DistillHook of a run."""
    return next(h for h in runner.hooks if type(h).__name__ == 'DistillHook')


def student_of(runner: Runner) -> torch.nn.Module:
    """The student, outside DDP."""
    return getattr(runner.model, 'module', runner.model)


def ema(runner: Runner) -> torch.nn.Module:
    """The EMA copy of a run."""
    return next(h for h in runner.hooks if type(h).__name__ == 'EMAHook').ema_model


def weights(runner: Runner) -> dict[str, torch.Tensor]:
    """Parameters and buffers of student and EMA copy, without adapters."""
    models = {'student': student_of(runner)}
    for hook in runner.hooks:
        if type(hook).__name__ == 'EMAHook':
            models['ema'] = hook.ema_model
    return {f'{name}.{k}': v.clone() for name, model in models.items() for k, v in model.state_dict().items()}


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
