"""A student and its distilled self at their first iteration."""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import DistillError
from kd_plugins.lab.benchmark.benchmark import Pair, Run, Use, end_distillation
from kd_plugins.lab.benchmark.measure import Moment
from kd_plugins.lab.benchmark.mm.batches import CLASSIFICATION, DETECTION, Batch, Detections, Labels, find_kind
from kd_plugins.mm.cli import _use_amp, add_distillation
from kd_plugins.mm.configs import load_config, remove_distillation, without_pretrained
from kd_plugins.mm.hook import DistillHook
from kd_plugins.mm.teacher import build_architecture
from kd_plugins.teachers import from_torchvision
from kd_plugins.teachers.network import create_network
from kd_plugins.teachers.sources import of_file


class _Attached(EpochBasedTrainLoop):
    """A run up to its first iteration: everything built, initialised, and every hook attached."""

    def run(self) -> nn.Module:
        began = Moment.now()
        self.runner.call_hook('before_train')
        self.attaching = Moment.now() - began
        return self.runner.model.train()


_count = itertools.count()


@dataclass(frozen=True, kw_only=True)
class MMPair(Pair):
    """A pair of one-stage detectors or classifiers.

    Attributes:
        student: Config of the student; a distilled one stands for its plain student.
        teacher: What ``tools/train.py --teacher`` takes.
        kd: Recipe.
        kind: What the student is trained on.
        image_size: ``(height, width)`` of every image in pixels.
        checkpoint: Weights of the teacher; None makes random ones, where the teacher is no file of its own.

    Raises:
        DistillError: A number is not positive, the device is not there, or a classifier takes another image size.
    """

    kd: str
    kind: Detections | Labels
    image_size: tuple[int, int]
    checkpoint: str | None = None

    summary: ClassVar[str] = (
        'Cost of a distilled training step against the plain step plus a bare forward of the teacher.'
    )
    epilog: ClassVar[str] = (
        'Classifiers are given images of their own size, by default '
        f'{CLASSIFICATION["batch_size"][0]} on the CPU and {CLASSIFICATION["batch_size"][1]} on CUDA.'
    )
    plain: ClassVar[str] = 'student'
    rows: ClassVar[Mapping[str, Sequence[str]]] = {
        'plain student step': ['student'],
        'bare teacher forward': ['teacher'],
        'both (lower bound)': ['student', 'teacher'],
        'distilled step': ['distilled'],
        'step after its stop': ['over'],
    }
    aims: ClassVar = {'ratio': ('distilled / (student + teacher)', ['student', 'teacher'], 1.05)}
    sizes: ClassVar = dict(DETECTION, repeats=(10, 40), steps=(1, 5))
    letters: ClassVar = dict(image_size='HW')
    #: kd_plugins:: are those of this project.
    pairs: ClassVar[Mapping[str, Sequence[str]]] = {
        'yolox': (
            'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
            'mmdet::yolox/yolox_l_8xb8-300e_coco.py',
            'yolo_logit',
        ),
        'rtmdet': (
            'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
            'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
            'yolo_logit',
        ),
        'gfl': ('mmdet::gfl/gfl_r50_fpn_1x_coco.py', 'mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py', 'localization'),
        'gfl-feature': ('mmdet::gfl/gfl_r50_fpn_1x_coco.py', 'mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py', 'feature'),
        'yolox-feature': (
            'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
            'mmdet::yolox/yolox_l_8xb8-300e_coco.py',
            'feature',
        ),
        'deit': (
            'kd_plugins::cls/deit_tiny_token_regnety_160_imagenet.py',
            'timm::regnety_160.deit_in1k',
            'deit_token',
        ),
        'resnet': ('kd_plugins::cls/resnet18_kl_resnet34_imagenet.py', 'timm::resnet34.tv_in1k', 'kl'),
        'vit-resnet': (
            'kd_plugins::cls/resnet50_feature_deit_base_imagenet.py',
            'timm::deit_base_patch16_224.fb_in1k',
            'vit_feature',
        ),
    }
    own: ClassVar = dict(
        student=('CFG', "config file or 'mmdet::path'"),
        teacher=('CFG', 'what tools/train.py takes: a config, timm::NAME, a .pt, ...'),
        kd=('RECIPE', 'name of a recipe or file'),
    )
    event: ClassVar[str] = 'before_train'
    includes: ClassVar[str] = 'teacher built, loaded and tried, adapters, summary'

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        super().__post_init__()
        if self.kind.fixed not in (None, self.image_size):
            raise DistillError(
                f'--image-size {" ".join(map(str, self.image_size))}: this classifier takes images of '
                f'{self.kind.fixed[0]} x {self.kind.fixed[1]} pixels; leave the option out.'
            )

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """As for every pair; and the teacher's weights."""
        super().add_options(parser)
        parser.add_argument('--teacher-checkpoint', metavar='PTH', help='weights of the teacher (default: random)')

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Of MMEngine, mmdet and timm."""
        return {name: import_module(name).__version__ for name in ('mmengine', 'mmdet', 'timm') if find_spec(name)}

    @classmethod
    def cases(cls, args: argparse.Namespace) -> list[MMPair]:
        """One for each pair; what the student is trained on is found here, once."""
        chosen = cls.chosen(args)
        if args.teacher_checkpoint and not args.student:
            raise DistillError('--teacher-checkpoint belongs to a pair of your own: --student, --teacher and --kd.')
        cases = []
        for pair in chosen:
            kind = find_kind(plain_config(pair['student']))
            numbers = cls.options(args, {**cls.sizes, **kind.sizes})
            cases.append(cls(**pair, kind=kind, checkpoint=args.teacher_checkpoint, amp=args.amp, **numbers))
        return cases

    @property
    def setup(self) -> dict[str, Any]:
        """As for every benchmark, with the weights in words."""
        given = self.teacher if of_file(self.teacher) else 'random weights'
        return {**super().setup, 'checkpoint': self.checkpoint or given}

    def _weights(self, folder: Path) -> str | None:
        path = folder / 'teacher.pth'
        if self.checkpoint is not None or of_file(self.teacher):
            return self.checkpoint
        if not path.is_file():
            random_teacher(self.teacher, self.kind.number, path)
        return str(path)

    def start(self, variants: Sequence[str], folder: Path, use: Use) -> Any:
        """Bring a Runner per variant to its first iteration."""
        config = plain_config(self.student)
        data = Batch(self.kind, config, self.image_size, self.batch_size)
        if self.amp:
            _use_amp(config)
        weights, runs = self._weights(folder), {}
        for name in variants:
            own = copy.deepcopy(config)
            began = Moment.now()
            if name in (self.ours, 'over'):
                add_distillation(own, self.kd, self.teacher, weights)
            if name == 'over':
                (own.model.distill if 'distill' in own.model else own.default_hooks.distill).stop = 1
            runs[name] = self._run(own, data, folder, began)
        try:
            return use(runs)
        finally:
            _close_logs()

    def _run(self, config: Config, data: Batch, folder: Path, began: Moment) -> Run:
        hooks = config.get('default_hooks') or {}
        runner = Runner(
            model=config.model,
            work_dir=str(folder),
            train_dataloader=DataLoader(data, self.batch_size, collate_fn=pseudo_collate),
            train_cfg=dict(type=_Attached, max_epochs=300),
            optim_wrapper=config.optim_wrapper,
            # Nothing that writes, and nothing that works between two steps: it costs both runs the same.
            default_hooks={
                **dict.fromkeys(('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')),
                **({'distill': hooks['distill']} if 'distill' in hooks else {}),
            },
            # Not its `mp_cfg`: how processes start is ours to say, for the measurement of memory.
            env_cfg=dict(
                cudnn_benchmark=(config.get('env_cfg') or {}).get('cudnn_benchmark', False),
                mp_cfg=dict(mp_start_method=multiprocessing.get_start_method()),
                dist_cfg={},
            ),
            log_level='ERROR',
            default_scope=config.get('default_scope', 'mmengine'),
            randomness=dict(seed=0),
            experiment_name=f'benchmark{next(_count)}',
            cfg=config,
        )
        runner.train()
        runner.model.to(self.device)
        for group in runner.optim_wrapper.optimizer.param_groups:
            # Every step costs the same when none changes the model: label assignment depends on what it predicts.
            group['lr'] = 0.0
        batch = next(iter(runner.train_dataloader))
        startup = Moment.now() - began
        hook = next((h for h in runner.hooks if isinstance(h, DistillHook)), None)
        if hook is not None and hook.session.window.stop is not None:
            end_distillation(hook.session)
        return Run(
            lambda: runner.model.train_step(batch, runner.optim_wrapper),
            startup,
            runner.train_loop.attaching,
            [teacher.model for teacher in hook.session.teachers.values()] if hook else [],
            dict(form='model' if 'distill' in config.model else 'hook') if hook else {},
        )

    @classmethod
    def title(cls, result: Mapping[str, Any]) -> tuple[str, str, str]:
        """The pair, the shape of a batch, and the precision."""
        setup = result['setup']
        height, width = setup['image_size']
        pair = f'{setup["student"]} <- {setup["teacher"]} ({setup["checkpoint"]}), {setup["kd"]}, {result["form"]} form'
        return pair, f'{setup["batch_size"]}x3x{height}x{width}', 'float16 AMP' if setup['amp'] else 'float32'


def plain_config(student: str) -> Config:
    """The student's own config: not distilled, with random weights and images of one size.

    Raises:
        DistillError: It cannot be read.
    """
    config = load_config(student, 'student')
    remove_distillation(config)
    config.model = without_pretrained(config.model)
    # Batch augmentations draw another image size every few steps.
    (config.model.get('data_preprocessor') or {}).pop('batch_augments', None)
    return config


def random_teacher(teacher: str, number: int, path: Path) -> None:
    """Write a checkpoint with random weights.

    Args:
        teacher: What ``tools/train.py --teacher`` takes.
        number: Classes of a teacher whose config does not say how many.
        path: File to write.

    Raises:
        DistillError: The teacher cannot be built.
    """
    # Otherwise the initialisation of every parameter is printed.
    MMLogger.get_instance(f'benchmark{next(_count)}', log_level='ERROR')
    zoo, _, name = teacher.partition('::')
    with untouched_rng():
        torch.manual_seed(1)
        if zoo == 'timm':
            model = create_network(name, num_classes=number, where='--teacher')
        elif zoo == 'torchvision':
            from_torchvision.check_name(name, '--teacher')
            model = torchvision.models.get_model(name, num_classes=number)
        else:
            model, _ = build_architecture(dict(config=teacher))
            model.init_weights()
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                # With a bias of 0 activations fade, layer by layer, into denormal numbers, on which a CPU is slow.
                nn.init.normal_(module.bias, std=0.5)
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)


def _close_logs() -> None:
    # The Runners' log files lie in a folder that is about to be removed.
    for name, logger in MMLogger._instance_dict.items():
        if name.startswith('benchmark'):
            for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
                handler.close()
                logger.removeHandler(handler)
