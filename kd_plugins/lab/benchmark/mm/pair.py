"""A student and its distilled self at their first iteration."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
from kd_plugins.lab.benchmark.mm.batches import Batch, find_kind
from kd_plugins.mm.cli import WITH_WEIGHTS, _use_amp, add_distillation, remove_distillation
from kd_plugins.mm.configs import load_config, without_pretrained
from kd_plugins.mm.hook import DistillHook
from kd_plugins.mm.teacher import build_architecture
from kd_plugins.teachers import from_torchvision
from kd_plugins.teachers.network import create_network

VARIANTS = ('student', 'teacher', 'distilled')


@dataclass(frozen=True)
class Setup:
    """One pair and how it is measured.

    Attributes:
        student: Config of the student; a distilled one stands for its plain student.
        teacher: What ``tools/train.py --teacher`` takes.
        kd: Recipe.
        checkpoint: Weights of the teacher; None makes random ones, where the teacher is no file of its own.
        image_size: ``(height, width)`` of every image in pixels.
        batch_size: Images per step.
        repeats: Measurements per variant.
        steps: Steps per measurement.
        warmup: Rounds that do not count.
        device: ``'cpu'`` or ``'cuda'``.
        threads: Threads of torch on the CPU.
        amp: Automatic mixed precision (float16 by MMEngine's ``AmpOptimWrapper``; CUDA only).
    """

    student: str
    teacher: str
    kd: str
    checkpoint: str | None = None
    image_size: tuple[int, int] = (320, 320)
    batch_size: int = 2
    repeats: int = 10
    steps: int = 1
    warmup: int = 2
    device: str = 'cpu'
    threads: int = 1
    amp: bool = False


class _Attached(EpochBasedTrainLoop):
    """A run up to its first iteration: everything built, initialised, and every hook attached."""

    def run(self) -> nn.Module:
        self.runner.call_hook('before_train')
        return self.runner.model.train()


_count = itertools.count()


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


def _start(config: Config, data: Batch, setup: Setup, work_dir: str) -> tuple[Runner, dict[str, Any]]:
    """A Runner at its first iteration, and its first batch."""
    hooks = config.get('default_hooks') or {}
    runner = Runner(
        model=config.model,
        work_dir=work_dir,
        train_dataloader=DataLoader(data, setup.batch_size, collate_fn=pseudo_collate),
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
    runner.model.to(setup.device)
    for group in runner.optim_wrapper.optimizer.param_groups:
        # Every step costs the same when none changes the model: label assignment depends on what it predicts.
        group['lr'] = 0.0
    return runner, next(iter(runner.train_dataloader))


def random_teacher(teacher: str, number: int, path: str) -> str | None:
    """Write a checkpoint with random weights.

    Args:
        teacher: What ``tools/train.py --teacher`` takes.
        number: Classes of a teacher whose config does not say how many.
        path: File to write.

    Returns:
        ``path``, or None for a teacher that is a file with weights.

    Raises:
        DistillError: The teacher cannot be built.
    """
    if teacher.endswith(WITH_WEIGHTS):
        return None
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
    return path


class Pair:
    """Student and distilled student at their first iteration.

    Args:
        setup: The pair and how it is measured; its ``checkpoint`` must be set, unless the teacher is a file.
        work_dir: Folder for what the Runner writes.
        only: Build what this variant needs, or everything.

    Attributes:
        form: ``'hook'`` or ``'model'``.
        startup: Seconds that distillation adds before the first iteration, or None if only one was built.
    """

    def __init__(self, setup: Setup, work_dir: str, only: str | None = None) -> None:
        config = plain_config(setup.student)
        data = Batch(find_kind(config), config, setup.image_size, setup.batch_size)
        if setup.amp:
            _use_amp(config)
        distilled = copy.deepcopy(config)
        if only is None:
            # Once for nothing: what is slow the first time must not count as the plain student's start-up.
            _start(config, data, setup, work_dir)
        start = time.perf_counter()
        add_distillation(distilled, setup.kd, setup.teacher, setup.checkpoint)
        choosing = time.perf_counter() - start
        self.form = 'hook' if 'distill' not in distilled.model else 'model'
        self.startup: float | None = None
        self._runs: dict[str, tuple[Runner, dict[str, Any]]] = {}
        seconds = {}
        for name, cfg in (('student', config), ('distilled', distilled)):
            if only is None or name == only or (name == 'distilled' and only == 'teacher'):
                start = time.perf_counter()
                self._runs[name] = _start(cfg, data, setup, work_dir)
                seconds[name] = time.perf_counter() - start
        if len(seconds) == 2:
            self.startup = choosing + seconds['distilled'] - seconds['student']

    def step(self, name: str) -> Callable[[], Any]:
        """One step of a variant: ``'student'``, ``'distilled'``, or ``'teacher'``, which is its bare forward."""
        if name == 'teacher':
            return self._bare_teacher()
        runner, data = self._runs[name]

        def step() -> Any:
            return runner.model.train_step(data, runner.optim_wrapper)

        return step

    def _bare_teacher(self) -> Callable[[], Any]:
        """The least a teacher costs: its forward up to the tapped modules, on the batch as it wants it."""
        runner, data = self._runs['distilled']
        hook = next(h for h in runner.hooks if isinstance(h, DistillHook))
        teacher = hook.session.teacher
        batch = runner.model.data_preprocessor(copy.deepcopy(data), True)
        inputs = teacher.to(batch['inputs'])._prepare(batch['inputs'], batch['data_samples'])
        modules = list(dict.fromkeys(path for t in hook.session.terms.values() for path in t.teacher.modules))

        @torch.no_grad()
        def forward() -> None:
            with runner.optim_wrapper.optim_context(runner.model):
                teacher._run(teacher.model, inputs, batch['data_samples'], modules)

        return forward
