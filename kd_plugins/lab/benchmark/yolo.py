"""What a distilled training step costs in Ultralytics, next to what it cannot do without and to ``distill_model=``.

The lower bound of a distilled step is the plain step plus one forward pass of the teacher. Plain, distilled and
natively distilled student are each brought up by Ultralytics' own trainer to its first batch; a step is what its loop
does with one: forward, loss, backward, optimizer, EMA.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import DistillError, nearest
from kd_plugins.lab.benchmark.measure import (
    Ratio,
    Spread,
    add_options,
    chosen_sizes,
    count_operators,
    figures,
    highest_memory,
    in_new_process,
    interleave,
    machine,
    memory,
    random_boxes,
    verdict,
)
from kd_plugins.yolo.callback import DistillCallback, check_version, quiet, registered
from kd_plugins.yolo.teacher import class_names, find_teacher, follow, load_model

#: Of a distilled step over plain step and bare teacher, and over a step with ``distill_model=``.
AIM, NATIVE_AIM = 1.05, 0.9
VARIANTS = ('plain', 'teacher', 'native', 'distilled')
ROWS = (
    ('plain student step', ['plain']),
    ('bare teacher forward', ['teacher']),
    ('both (lower bound)', ['plain', 'teacher']),
    ('step with distill_model=', ['native']),
    ('step with kd_plugins', ['distilled']),
)
#: Defaults on the CPU and on CUDA.
SIZES = dict(image_size=(320, 640), batch_size=(2, 16), repeats=(10, 40), steps=(1, 5))

#: Pairs by name: student, teacher.
PAIRS = {
    'yolo11': ('yolo11n.yaml', 'yolo11l.yaml'),
    'yolo11-x': ('yolo11n.yaml', 'yolo11x.yaml'),
    'yolov8': ('yolov8n.yaml', 'yolov8m.yaml'),
    'yolo26': ('yolo26n.yaml', 'yolo26l.yaml'),
}


@dataclass(frozen=True)
class Setup:
    """One pair and how it is measured.

    Attributes:
        student: Its ``.yaml`` or ``.pt``.
        teacher: Its ``.pt``, or a ``.yaml`` for random weights.
        image_size: Side of the square images in pixels.
        batch_size: Images per step.
        repeats: Measurements per variant.
        steps: Steps per measurement.
        warmup: Rounds that do not count.
        device: ``'cpu'`` or a CUDA device as Ultralytics names it, ``'0'``.
        threads: Threads of torch on the CPU.
        amp: Automatic mixed precision as Ultralytics does it (CUDA only).
    """

    student: str
    teacher: str
    image_size: int = 320
    batch_size: int = 2
    repeats: int = 10
    steps: int = 1
    warmup: int = 2
    device: str = 'cpu'
    threads: int = 1
    amp: bool = False


class _Attached(Exception):
    """Leaves a trainer that was only brought up."""


# ---------------------------------------------------------------------- data, teacher and trainers
def write_data(folder: Path, setup: Setup, names: Sequence[str]) -> str:
    """As many random images as a batch has, with 7 boxes each; returns the data set's YAML."""
    draw = torch.Generator().manual_seed(0)
    side = setup.image_size
    for kind in ('images', 'labels'):
        (folder / kind).mkdir(parents=True)
    for i in range(setup.batch_size):
        pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=draw)
        Image.fromarray(np.asarray(pixels)).save(folder / 'images' / f'{i}.png')
        boxes = random_boxes(7, torch.tensor([side, side]), draw) / side
        centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        labels = torch.randint(len(names), (7,), generator=draw)
        rows = (
            f'{label} ' + ' '.join(f'{v:.6f}' for v in row)
            for label, row in zip(labels.tolist(), torch.cat([centres, sizes], 1).tolist(), strict=True)
        )
        (folder / 'labels' / f'{i}.txt').write_text('\n'.join(rows))
    data = folder / 'data.yaml'
    data.write_text(json.dumps(dict(path=str(folder), train='images', val='images', names=dict(enumerate(names)))))
    return str(data)


def random_teacher(spec: str, path: Path) -> str:
    """Write a ``.pt`` with random weights for a model YAML; returns its path."""
    from ultralytics import YOLO

    with untouched_rng():
        torch.manual_seed(1)
        model = YOLO(spec, task='detect', verbose=False)
        for module in model.model.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                # With a bias of 0 activations fade, layer by layer, into denormal numbers, on which a CPU is slow.
                nn.init.normal_(module.bias, std=0.5)
        model.save(path)
    return str(path)


def bring_up(
    setup: Setup, data: str, folder: Path, variants: Sequence[str], measure: Callable[[Mapping[str, Any]], Any]
) -> Any:
    """Bring a trainer per variant to its first batch, one inside the other, and measure.

    Args:
        setup: The pair; its ``teacher`` is a ``.pt``.
        data: Data set YAML.
        folder: Where the trainers write.
        variants: Of ``'plain'``, ``'native'`` and ``'distilled'``.
        measure: Called with the trainers by variant, each at ``on_train_start``; and with ``seconds``, their
            start-up times.

    Returns:
        What ``measure`` returned.
    """
    from ultralytics.models.yolo.detect import DetectionTrainer

    ready: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    outcome: list[Any] = []

    def start(rest: Sequence[str]) -> None:
        if not rest:
            outcome.append(measure({**ready, 'seconds': seconds}))
            return
        name, *others = rest
        trainer = DetectionTrainer(overrides=_overrides(setup, data, folder, name))

        def started(trainer: Any) -> None:
            seconds[name] = time.perf_counter() - began
            ready[name] = trainer
            start(others)
            raise _Attached

        if name == 'distilled':
            DistillCallback(setup.teacher).register(trainer)
        # After it, so that the student is distilled by then.
        trainer.add_callback('on_train_start', started)
        began = time.perf_counter()
        with suppress(_Attached):
            trainer.train()

    start(variants)
    return outcome[0]


def _overrides(setup: Setup, data: str, folder: Path, variant: str) -> dict[str, Any]:
    return dict(
        model=setup.student,
        data=data,
        imgsz=setup.image_size,
        batch=setup.batch_size,
        epochs=100,
        device=setup.device,
        amp=setup.amp,
        workers=0,
        project=str(folder),
        name=variant,
        exist_ok=True,
        plots=False,
        verbose=False,
        optimizer='SGD',
        # The same batch again and again.
        mosaic=0.0,
        distill_model=setup.teacher if variant == 'native' else None,
    )


def step_of(trainer: Any) -> Callable[[], Any]:
    """One training step of a trainer that was brought up, always on its first batch and with a learning rate of 0."""
    for group in trainer.optimizer.param_groups:
        # Every step costs the same when none changes the model: label assignment depends on what it predicts.
        group['lr'] = 0.0
    trainer.model.train()
    trainer.optimizer.zero_grad()
    batch = next(iter(trainer.train_loader))
    kind = trainer.device.type

    def step() -> None:
        with torch.autocast(kind, enabled=bool(trainer.amp)):
            loss, _ = trainer.model(trainer.preprocess_batch(copy.copy(batch)))
        trainer.scaler.scale(loss.sum()).backward()
        trainer.optimizer_step()

    return step


def bare_teacher(trainer: Any) -> Callable[[], Any]:
    """The least a teacher costs: its forward without decoding, fused, on the batch as it wants it."""
    from ultralytics.utils.torch_utils import unwrap_model

    teacher = owner_of_distiller(trainer).teacher
    image = trainer.preprocess_batch(copy.copy(next(iter(trainer.train_loader))))['img']
    kind = trainer.device.type
    student = unwrap_model(trainer.model)

    @torch.no_grad()
    def forward() -> None:
        with torch.autocast(kind, enabled=bool(trainer.amp)):
            teacher.model(follow(teacher, image, student))

    return forward


def owner_of_distiller(trainer: Any) -> Any:
    """The running distillation of a trainer that was brought up."""
    (callback,) = registered(trainer)
    return callback.distiller


# ---------------------------------------------------------------------- measuring
def measure(setup: Setup, with_memory: bool = True) -> dict[str, Any]:
    """Measure one pair.

    Args:
        setup: The pair and how it is measured.
        with_memory: Measure peak memory too, each variant in a process of its own.

    Returns:
        Plain data: ``setup``, ``seconds`` (per variant: median, low, high, all), ``ratio`` and ``native_ratio`` (value,
        low, high, aim, verdict), ``operators`` and ``waiting`` per variant, ``memory`` (bytes per variant or None),
        ``startup`` in seconds.

    Raises:
        DistillError: The pair does not fit, or the device is not there.
    """
    check(setup)
    given = setup
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not setup.teacher.endswith('.pt'):
            setup = replace(setup, teacher=random_teacher(setup.teacher, folder / 'teacher.pt'))
        else:
            setup = replace(setup, teacher=find_teacher(setup.teacher))
        names = class_names(load_model(setup.teacher).names)
        data = write_data(folder / 'data', setup, names)

        def timed(trainers: Mapping[str, Any]) -> dict[str, Any]:
            # Ultralytics sets its own number when it chooses the device.
            torch.set_num_threads(setup.threads)
            steps = {name: step_of(trainers[name]) for name in VARIANTS if name != 'teacher'}
            steps['teacher'] = bare_teacher(trainers['distilled'])
            synchronize = None if setup.device == 'cpu' else torch.cuda.synchronize
            seconds = interleave(steps, setup.repeats, warmup=setup.warmup, steps=setup.steps, synchronize=synchronize)
            counts = {name: count_operators(step) for name, step in steps.items()}
            return dict(seconds=seconds, counts=counts, startup=dict(trainers['seconds']))

        # Once for nothing: what is slow the first time must not count as one variant's start-up.
        with quiet():
            bring_up(setup, data, folder, ['plain'], lambda trainers: None)
            found = bring_up(setup, data, folder, ['plain', 'distilled', 'native'], timed)
        seconds, counts = found['seconds'], found['counts']
        bound = [p + t for p, t in zip(seconds['plain'], seconds['teacher'], strict=True)]
        ratio, native = Ratio.of(seconds['distilled'], bound), Ratio.of(seconds['distilled'], seconds['native'])
        result = dict(
            setup=asdict(given),
            seconds={name: {**asdict(Spread.of(values)), 'all': values} for name, values in seconds.items()},
            bound=asdict(Spread.of(bound)),
            ratio={**asdict(ratio), 'aim': AIM, 'verdict': ratio.verdict(AIM)},
            native_ratio={**asdict(native), 'aim': NATIVE_AIM, 'verdict': native.verdict(NATIVE_AIM)},
            operators={name: count.total for name, count in counts.items()},
            waiting={name: count.waiting for name, count in counts.items()},
            startup=found['startup']['distilled'] - found['startup']['plain'],
            memory=None,
        )
        if with_memory:
            result['memory'] = {v: in_new_process(peak_memory, setup, data, name, v) for v in VARIANTS}
    return result


def check(setup: Setup) -> None:
    """Refuse what cannot be measured.

    Raises:
        DistillError: A number is not positive, Ultralytics is too old, or the device is not there.
    """
    check_version()
    for name in ('image_size', 'batch_size', 'repeats', 'steps', 'threads'):
        if getattr(setup, name) < 1:
            raise DistillError(f'{name} must be at least 1, got {getattr(setup, name)}.')
    if setup.image_size % 32:
        raise DistillError(f'image_size must be a multiple of 32, got {setup.image_size}.')
    if setup.device != 'cpu' and not torch.cuda.is_available():
        raise DistillError('--device cuda: torch sees no CUDA device here; use --device cpu.')
    if setup.amp and setup.device == 'cpu':
        raise DistillError('--amp needs --device cuda.')


def peak_memory(setup: Setup, data: str, folder: str, variant: str, steps: int = 3) -> int | None:
    """Peak bytes that a variant adds to the process, weights and optimizer state included.

    Meant for a fresh process: what an allocator once had, it keeps. The teacher's figure includes the idle student
    that it is attached to.
    """
    import ultralytics.models.yolo.detect  # noqa: F401  # counts for none of the variants

    device = torch.device('cpu' if setup.device == 'cpu' else 'cuda')
    before = memory(device)
    peaks: list[int | None] = []

    def run(trainers: Mapping[str, Any]) -> None:
        torch.set_num_threads(setup.threads)
        step = bare_teacher(trainers['distilled']) if variant == 'teacher' else step_of(trainers[variant])
        peaks.append(highest_memory(step, steps, device))

    with quiet():
        bring_up(setup, data, Path(folder), ['distilled' if variant == 'teacher' else variant], run)
    (peak,) = peaks
    return None if peak is None or before is None else peak - before


# ---------------------------------------------------------------------- report
def table(result: dict[str, Any]) -> str:
    """What :func:`measure` returned, for people."""
    setup = result['setup']
    weights = '' if setup['teacher'].endswith('.pt') else ' (random weights)'
    steps = f' of {setup["steps"]} steps' if setup['steps'] > 1 else ''
    side = setup['image_size']
    lines = [
        f'{setup["student"]} <- {setup["teacher"]}{weights}',
        f'{setup["batch_size"]}x3x{side}x{side}, {"AMP" if setup["amp"] else "float32"}, {setup["device"]}, '
        f'{setup["threads"]} thread(s), {setup["repeats"]} interleaved repeats{steps}',
        '',
        *figures(result, ROWS),
        '',
        f'kd_plugins / (plain + teacher)  {verdict(result["ratio"])}',
        f'kd_plugins / distill_model=     {verdict(result["native_ratio"])}',
        f'start-up  +{result["startup"]:.1f} s (teacher loaded, fused and tried, summary)',
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
        prog='benchmark.py --zoo yolo',
        description='Cost of a distilled training step in Ultralytics against the plain step plus a bare forward of '
        'the teacher, and against a step with distill_model=.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--zoo', choices=['yolo'], default='yolo', help='framework')
    parser.add_argument(
        '--pair', action='append', metavar='NAME', help=f'{", ".join(PAIRS)} or all; may be repeated (default: yolo11)'
    )
    own = parser.add_argument_group('a pair of your own')
    own.add_argument('--student', metavar='MODEL', help='.yaml or .pt of a detector')
    own.add_argument('--teacher', metavar='MODEL', help='.pt, or .yaml for random weights')
    add_options(parser, SIZES)
    args = parser.parse_args(argv)
    check_version()
    import ultralytics

    device = '0' if args.device == 'cuda' else 'cpu'
    sizes = chosen_sizes(args, SIZES)
    info = machine(ultralytics=ultralytics.__version__)
    print(', '.join(f'{k} {v}' for k, v in info.items() if v is not None), flush=True)
    results = []
    for student, teacher in _pairs(args):
        setup = Setup(student, teacher, device=device, threads=args.threads, amp=args.amp, **sizes)
        results.append(measure(setup, not args.no_memory))
        print('\n' + table(results[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine=info, pairs=results), indent=1) + '\n')
    return results


def _pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    if args.student or args.teacher:
        if not (args.student and args.teacher):
            raise DistillError('--student and --teacher go together.')
        if args.pair:
            raise DistillError('--pair names a ready pair; leave it out together with --student and --teacher.')
        return [(args.student, args.teacher)]
    names = args.pair or ['yolo11']
    if 'all' in names:
        names = list(PAIRS)
    for name in names:
        if name not in PAIRS:
            raise DistillError(f'--pair {name!r} is unknown; {nearest(name, [*PAIRS, "all"])}')
    return [PAIRS[name] for name in dict.fromkeys(names)]
