"""What a distilled training step costs in MMEngine, next to what it cannot do without.

The lower bound of a distilled step is the plain step plus one forward pass of the teacher. Student and distilled
student are both brought up by MMEngine's own Runner and step through ``train_step`` and their ``OptimWrapper``; the
teacher is attached by ``DistillHook`` as in any run.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mmdet
import mmengine
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.structures import InstanceData
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import DistillError, nearest
from kd_plugins.measure import (
    Ratio,
    Spread,
    add_options,
    chosen_sizes,
    count_operators,
    figures,
    in_new_process,
    interleave,
    machine,
    memory,
    random_boxes,
    reset_peak,
    verdict,
)
from kd_plugins.mm.cli import _use_amp, add_distillation
from kd_plugins.mm.configs import load_config, without_pretrained
from kd_plugins.mm.forward import run_modules
from kd_plugins.mm.hook import DistillHook
from kd_plugins.mm.teacher import build_architecture, dataset_classes

AIM = 1.05
VARIANTS = ('student', 'teacher', 'distilled')
ROWS = (
    ('plain student step', ['student']),
    ('bare teacher forward', ['teacher']),
    ('both (lower bound)', ['student', 'teacher']),
    ('distilled step', ['distilled']),
)
#: Defaults on the CPU and on CUDA.
SIZES = dict(image_size=((320, 320), (640, 640)), batch_size=(2, 8), repeats=(10, 40), steps=(1, 5))

#: Pairs by name: student, teacher, recipe.
PAIRS = {
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
}


@dataclass(frozen=True)
class Setup:
    """One pair and how it is measured.

    Attributes:
        student: Config of the student.
        teacher: Config of the teacher.
        kd: Recipe.
        checkpoint: Weights of the teacher; None makes random ones.
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


# ---------------------------------------------------------------------- a batch and two runs
class _Scenes(torch.utils.data.Dataset):
    """As many random images as a batch has, with boxes as COCO has them: 7 per image, small ones prevail."""

    def __init__(self, setup: Setup, classes: Sequence[str] | None, number: int) -> None:
        from mmdet.structures import DetDataSample

        self.metainfo = {} if classes is None else {'classes': tuple(classes)}
        height, width = setup.image_size
        draw = torch.Generator().manual_seed(0)
        size = torch.tensor([width, height])
        self._items = []
        for _ in range(setup.batch_size):
            boxes = random_boxes(7, size, draw)
            sample = DetDataSample(
                metainfo=dict(
                    img_id=0,
                    img_shape=setup.image_size,
                    ori_shape=setup.image_size,
                    scale_factor=(1.0, 1.0),
                    flip=False,
                )
            )
            sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.randint(number, (7,), generator=draw))
            image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=draw)
            self._items.append(dict(inputs=image, data_samples=sample))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return copy.deepcopy(self._items[index])


class _Attached(EpochBasedTrainLoop):
    """A run up to its first iteration: everything built, initialised, and every hook attached."""

    def run(self) -> nn.Module:
        self.runner.call_hook('before_train')
        return self.runner.model.train()


_count = itertools.count()


def _start(config: Config, setup: Setup, work_dir: str) -> tuple[Runner, dict[str, Any]]:
    """A Runner at its first iteration, and the batch it is given."""
    number = _num_classes(config)
    names = dataset_classes(config)
    data = _Scenes(setup, names if names is not None and len(names) == number else None, number)
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
        env_cfg=dict(cudnn_benchmark=(config.get('env_cfg') or {}).get('cudnn_benchmark', False), dist_cfg={}),
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


def _num_classes(config: Config) -> int:
    """Number of classes of a detector's config, found without building it.

    Raises:
        DistillError: There is no ``bbox_head.num_classes``.
    """
    number = (config.model.get('bbox_head') or {}).get('num_classes')
    if not isinstance(number, int):
        raise DistillError(
            f'The benchmark makes batches with boxes, for one-stage detectors (model.bbox_head.num_classes); '
            f'{config.model.get("type")} has none.'
        )
    return number


def random_teacher(setup: Setup, path: str) -> str:
    """Write a checkpoint with random weights for the teacher.

    Args:
        setup: The pair.
        path: File to write.

    Returns:
        ``path``.
    """
    # Otherwise the initialisation of every parameter is printed.
    MMLogger.get_instance(f'benchmark{next(_count)}', log_level='ERROR')
    with untouched_rng():
        torch.manual_seed(1)
        model, _ = build_architecture(dict(config=setup.teacher))
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
        setup: The pair and how it is measured; its ``checkpoint`` must be set.
        work_dir: Folder for what the Runner writes.
        only: Build what this variant needs, or everything.

    Attributes:
        form: ``'hook'`` or ``'model'``.
        startup: Seconds that distillation adds before the first iteration, or None if only one was built.
    """

    def __init__(self, setup: Setup, work_dir: str, only: str | None = None) -> None:
        config = load_config(setup.student, 'student')
        config.model = without_pretrained(config.model)
        # Batch augmentations draw another image size every few steps.
        (config.model.get('data_preprocessor') or {}).pop('batch_augments', None)
        if setup.amp:
            _use_amp(config)
        distilled = copy.deepcopy(config)
        if only is None:
            # Once for nothing: what is slow the first time must not count as the plain student's start-up.
            _start(config, setup, work_dir)
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
                self._runs[name] = _start(cfg, setup, work_dir)
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
        teacher = hook.distiller.teacher
        batch = runner.model.data_preprocessor(copy.deepcopy(data), True)
        inputs = teacher.to(batch['inputs'])._prepare(batch['inputs'], batch['data_samples'])
        modules = list(dict.fromkeys(t.teacher.module for t in hook.distiller.terms.values()))

        @torch.no_grad()
        def forward() -> None:
            with runner.optim_wrapper.optim_context(runner.model):
                run_modules(teacher.model, inputs, batch['data_samples'], modules)

        return forward


# ---------------------------------------------------------------------- measuring
def measure(setup: Setup, with_memory: bool = True) -> dict[str, Any]:
    """Measure one pair.

    Args:
        setup: The pair and how it is measured.
        with_memory: Measure peak memory too, each variant in a process of its own.

    Returns:
        Plain data: ``setup``, ``form``, ``seconds`` (per variant: median, low, high, all), ``ratio`` (value, low,
        high, aim, verdict), ``operators`` and ``waiting`` per variant, ``memory`` (bytes per variant or None),
        ``startup`` in seconds.

    Raises:
        DistillError: The pair does not fit, or the device is not there.
    """
    check(setup)
    torch.set_num_threads(setup.threads)
    with tempfile.TemporaryDirectory() as folder:
        random = setup.checkpoint is None
        if random:
            setup = replace(setup, checkpoint=random_teacher(setup, os.path.join(folder, 'teacher.pth')))
        pair = Pair(setup, folder)
        steps = {name: pair.step(name) for name in VARIANTS}
        synchronize = torch.cuda.synchronize if setup.device == 'cuda' else None
        seconds = interleave(steps, setup.repeats, warmup=setup.warmup, steps=setup.steps, synchronize=synchronize)
        counts = {name: count_operators(step) for name, step in steps.items()}
        bound = [s + t for s, t in zip(seconds['student'], seconds['teacher'], strict=True)]
        ratio = Ratio.of(seconds['distilled'], bound)
        result = dict(
            setup={**asdict(setup), 'checkpoint': None if random else setup.checkpoint},
            form=pair.form,
            seconds={name: {**asdict(Spread.of(values)), 'all': values} for name, values in seconds.items()},
            bound=asdict(Spread.of(bound)),
            ratio={**asdict(ratio), 'aim': AIM, 'verdict': ratio.verdict(AIM)},
            operators={name: count.total for name, count in counts.items()},
            waiting={name: count.waiting for name, count in counts.items()},
            startup=pair.startup,
            memory=None,
        )
        _close_logs()
        del pair, steps
        if with_memory:
            result['memory'] = {name: in_new_process(peak_memory, setup, name, folder) for name in VARIANTS}
    return result


def check(setup: Setup) -> None:
    """Refuse what cannot be measured.

    Raises:
        DistillError: A number is not positive, or the device is not there.
    """
    numbers = dict(
        image_size=min(setup.image_size),
        batch_size=setup.batch_size,
        repeats=setup.repeats,
        steps=setup.steps,
        threads=setup.threads,
    )
    for name, value in numbers.items():
        if value < 1:
            raise DistillError(f'{name} must be at least 1, got {value}.')
    if setup.device == 'cuda' and not torch.cuda.is_available():
        raise DistillError('--device cuda: torch sees no CUDA device here; use --device cpu.')
    if setup.amp and setup.device == 'cpu':
        raise DistillError("--amp needs --device cuda: MMEngine's AmpOptimWrapper does not work on the CPU.")


def peak_memory(setup: Setup, variant: str, work_dir: str, steps: int = 3) -> int | None:
    """Peak bytes that a variant adds to the process, weights and optimizer state included.

    Meant for a fresh process: what an allocator once had, it keeps. The teacher's figure includes the weights of the
    idle student that it is attached to.
    """
    torch.set_num_threads(setup.threads)
    device = torch.device(setup.device)
    before = memory(device)
    step = Pair(setup, work_dir, variant).step(variant)
    reset_peak(device)
    for _ in range(steps):
        step()
    peak = memory(device, peak=True)
    _close_logs()
    return None if peak is None or before is None else peak - before


def _close_logs() -> None:
    # The Runners' log files lie in a folder that is about to be removed.
    for name, logger in MMLogger._instance_dict.items():
        if name.startswith('benchmark'):
            for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
                handler.close()
                logger.removeHandler(handler)


# ---------------------------------------------------------------------- report
def table(result: dict[str, Any]) -> str:
    """What :func:`measure` returned, for people."""
    setup, ratio = result['setup'], result['ratio']
    height, width = setup['image_size']
    weights = 'random weights' if setup['checkpoint'] is None else setup['checkpoint']
    steps = f' of {setup["steps"]} steps' if setup['steps'] > 1 else ''
    lines = [
        f'{setup["student"]} <- {setup["teacher"]} ({weights}), {setup["kd"]}, {result["form"]} form',
        f'{setup["batch_size"]}x3x{height}x{width}, {"float16 AMP" if setup["amp"] else "float32"}, '
        f'{setup["device"]}, {setup["threads"]} thread(s), {setup["repeats"]} interleaved repeats{steps}',
        '',
        *figures(result, ROWS),
        '',
        f'distilled / (student + teacher)  {verdict(ratio)}',
        f'start-up                         +{result["startup"]:.1f} s '
        '(teacher built, loaded and tried, adapters, summary)',
    ]
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the command line asks for, print a table per pair and write the JSON.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Returns:
        One result of :func:`measure` per pair.

    Raises:
        DistillError: The options or the pair do not fit.
    """
    parser = argparse.ArgumentParser(
        prog='benchmark.py',
        description='Cost of a distilled training step against the plain step plus a bare forward of the teacher.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--zoo', choices=['mm'], default='mm', help='framework')
    parser.add_argument(
        '--pair', action='append', metavar='NAME', help=f'{", ".join(PAIRS)} or all; may be repeated (default: yolox)'
    )
    own = parser.add_argument_group('a pair of your own')
    own.add_argument('--student', metavar='CFG', help="config file or 'mmdet::path'")
    own.add_argument('--teacher', metavar='CFG', help="config file or 'mmdet::path'")
    own.add_argument('--kd', metavar='RECIPE', help='name in configs/kd or file')
    own.add_argument('--teacher-checkpoint', metavar='PTH', help='weights of the teacher (default: random)')
    add_options(parser, SIZES)
    args = parser.parse_args(argv)
    sizes = chosen_sizes(args, SIZES)
    sizes['image_size'] = tuple(sizes['image_size'])
    info = machine(mmengine=mmengine.__version__, mmdet=mmdet.__version__)
    print(', '.join(f'{k} {v}' for k, v in info.items() if v is not None), flush=True)
    results = []
    for student, teacher, kd in _pairs(args):
        setup = Setup(
            student,
            teacher,
            kd,
            checkpoint=args.teacher_checkpoint,
            device=args.device,
            threads=args.threads,
            amp=args.amp,
            **sizes,
        )
        results.append(measure(setup, not args.no_memory))
        print('\n' + table(results[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine=info, pairs=results), indent=1) + '\n')
    return results


def _pairs(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    own = {'--student': args.student, '--teacher': args.teacher, '--kd': args.kd}
    missing = [option for option, value in own.items() if not value]
    if not missing:
        if args.pair:
            raise DistillError('--pair names a ready pair; leave it out together with --student, --teacher and --kd.')
        return [(args.student, args.teacher, args.kd)]
    if len(missing) < len(own):
        raise DistillError(f'--student, --teacher and --kd go together; {" and ".join(missing)} is missing.')
    if args.teacher_checkpoint:
        raise DistillError('--teacher-checkpoint belongs to a pair of your own: --student, --teacher and --kd.')
    names = args.pair or ['yolox']
    if 'all' in names:
        names = list(PAIRS)
    for name in names:
        if name not in PAIRS:
            raise DistillError(f'--pair {name!r} is unknown; {nearest(name, [*PAIRS, "all"])}')
    return [PAIRS[name] for name in dict.fromkeys(names)]
