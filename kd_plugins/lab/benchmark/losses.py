"""What a loss between two dense maps costs, forward and backward, next to the formula as one would write it.

At 8 x 150 x 512 x 512 (ADE20K) one map of class logits takes 1.2 GiB, and the plain formula seven of them: 3.5 times
its inputs. Both maps and the student's gradient are what no way of computing can do without: 1.5 times the inputs.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import kd_plugins.losses as losses
from kd_plugins.errors import DistillError, nearest
from kd_plugins.lab.benchmark.measure import (
    Ratio,
    Spread,
    count_operators,
    figures,
    highest_memory,
    in_new_process,
    interleave,
    machine,
    memory,
    verdict,
)

#: Peak memory over the bytes of both inputs, and time over the plain formula's.
AIMS = dict(memory=2.0, seconds=1.0)
DEFAULT = 'pixelwise_kl_div'
#: What a loss may consume to be measured here: two maps.
MAPS = ('features', 'masks', 'segmentation')
#: Of every loss that has one.
TEMPERATURE = 2.0


def _plain_pixelwise(student: Tensor, teacher: Tensor) -> Tensor:
    log_student = functional.log_softmax(student / TEMPERATURE, 1)
    divergence = functional.kl_div(log_student, functional.softmax(teacher / TEMPERATURE, 1), reduction='sum')
    return TEMPERATURE**2 * divergence / (len(student) * student[0, 0].numel())


def _plain_channel_wise(student: Tensor, teacher: Tensor) -> Tensor:
    log_student = functional.log_softmax(student.flatten(2) / TEMPERATURE, 2)
    target = functional.softmax(teacher.flatten(2) / TEMPERATURE, 2)
    divergence = functional.kl_div(log_student, target, reduction='sum')
    return TEMPERATURE**2 * divergence / (student.shape[0] * student.shape[1])


#: The formula in the fewest calls of torch, for the losses that have one.
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'channel_wise_div': _plain_channel_wise,
    'pixelwise_kl_div': _plain_pixelwise,
}


@dataclass(frozen=True)
class Setup:
    """One loss and how it is measured.

    Attributes:
        loss: Name of a function in ``kd_plugins.losses``.
        shape: ``(B, C, H, W)`` of both maps.
        repeats: Measurements per variant.
        steps: Steps per measurement.
        warmup: Rounds that do not count.
        device: ``'cpu'`` or ``'cuda'``.
        threads: Threads of torch on the CPU.
    """

    loss: str
    shape: tuple[int, int, int, int] = (2, 150, 512, 512)
    repeats: int = 5
    steps: int = 1
    warmup: int = 1
    device: str = 'cpu'
    threads: int = 1


def map_losses() -> list[str]:
    """Names of the losses that compare two maps and need nothing else."""
    exported = [getattr(losses, name) for name in losses.__all__]
    consumes = {x.__module__: x.consumes for x in exported if isinstance(x, type) and issubclass(x, losses.DistillLoss)}
    functions = [x for x in exported if not isinstance(x, type) and consumes.get(x.__module__) in MAPS]
    return [f.__name__ for f in functions if _required(f) == 2]


def _required(function: Callable[..., Any]) -> int:
    return sum(p.default is p.empty for p in inspect.signature(function).parameters.values())


def variants(setup: Setup) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is compared: ``'ours'``, and ``'plain'`` where there is such a formula.

    Raises:
        DistillError: The loss does not exist or does not compare two maps.
    """
    if setup.loss not in map_losses():
        raise DistillError(f'--loss {setup.loss!r} is not a loss of two maps; {nearest(setup.loss, map_losses())}')
    function = getattr(losses, setup.loss)
    options = {'temperature': TEMPERATURE} if 'temperature' in inspect.signature(function).parameters else {}
    result = {'ours': lambda student, teacher: function(student, teacher, **options)}
    if setup.loss in PLAIN:
        result['plain'] = PLAIN[setup.loss]
    return result


def _maps(setup: Setup) -> tuple[Tensor, Tensor]:
    draw = torch.Generator(setup.device).manual_seed(0)
    student, teacher = (torch.randn(setup.shape, generator=draw, device=setup.device) for _ in range(2))
    return student.requires_grad_(), teacher


def _step(function: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Callable[[], Tensor]:
    """Forward, and backward to the student's map."""
    return lambda: torch.autograd.grad(function(student, teacher), student)[0]


def measure(setup: Setup, with_memory: bool = True) -> dict[str, Any]:
    """Measure one loss.

    Args:
        setup: The loss and how it is measured.
        with_memory: Measure peak memory too, each variant in a process of its own.

    Returns:
        Plain data: ``setup``, ``inputs`` (bytes of both maps), ``seconds`` (per variant: median, low, high, all),
        ``operators`` and ``waiting`` per variant, ``memory`` (bytes per variant or None); ``ratio`` (ours over plain)
        and ``memory_ratio`` (ours over ``inputs``) with value, low, high, aim and verdict, or None.

    Raises:
        DistillError: The loss does not exist, a number is not positive, or the device is not there.
    """
    check(setup)
    torch.set_num_threads(setup.threads)
    functions = variants(setup)
    student, teacher = _maps(setup)
    inputs = sum(x.numel() * x.element_size() for x in (student, teacher))
    steps = {name: _step(function, student, teacher) for name, function in functions.items()}
    synchronize = torch.cuda.synchronize if setup.device == 'cuda' else None
    seconds = interleave(steps, setup.repeats, warmup=setup.warmup, steps=setup.steps, synchronize=synchronize)
    counts = {name: count_operators(step) for name, step in steps.items()}
    ratio = Ratio.of(seconds['ours'], seconds['plain']) if 'plain' in seconds else None
    del student, teacher, steps
    used = {name: in_new_process(peak_memory, setup, name) for name in functions} if with_memory else None
    bytes_ratio = Ratio.of([used['ours']], [inputs]) if used and used['ours'] is not None else None
    return dict(
        setup=asdict(setup),
        inputs=inputs,
        seconds={name: {**asdict(Spread.of(values)), 'all': values} for name, values in seconds.items()},
        bound=None,
        ratio=_judged(ratio, AIMS['seconds']),
        memory=used,
        memory_ratio=_judged(bytes_ratio, AIMS['memory']),
        operators={name: count.total for name, count in counts.items()},
        waiting={name: count.waiting for name, count in counts.items()},
    )


def _judged(ratio: Ratio | None, aim: float) -> dict[str, Any] | None:
    return None if ratio is None else {**asdict(ratio), 'aim': aim, 'verdict': ratio.verdict(aim)}


def check(setup: Setup) -> None:
    """Refuse what cannot be measured.

    Raises:
        DistillError: A number is not positive, or the device is not there.
    """
    numbers = dict(shape=min(setup.shape), repeats=setup.repeats, steps=setup.steps, threads=setup.threads)
    for name, value in numbers.items():
        if value < 1:
            raise DistillError(f'{name} must be at least 1, got {value}.')
    if setup.device == 'cuda' and not torch.cuda.is_available():
        raise DistillError('--device cuda: torch sees no CUDA device here; use --device cpu.')


def peak_memory(setup: Setup, variant: str, steps: int = 2) -> int | None:
    """Peak bytes of a variant: both inputs, the gradient, and whatever it holds in between.

    Meant for a fresh process: what an allocator once had, it keeps. On the CPU it is the process that grows.
    """
    torch.set_num_threads(setup.threads)
    device = torch.device(setup.device)
    function = variants(setup)[variant]
    # What torch loads and starts at its first steps belongs to no variant.
    small = Setup(setup.loss, (1, 2, 8, 8), device=setup.device)
    _step(function, *_maps(small))()
    before = memory(device)
    step = _step(function, *_maps(setup))
    peak = highest_memory(step, steps, device)
    return None if peak is None or before is None else peak - before


# ---------------------------------------------------------------------- report
def table(result: dict[str, Any]) -> str:
    """What :func:`measure` returned, for people."""
    setup, used, inputs = result['setup'], result['memory'] or {}, result['inputs']
    steps = f' of {setup["steps"]} steps' if setup['steps'] > 1 else ''
    labels = {'ours': f'kd_plugins.losses.{setup["loss"]}', 'plain': 'plain formula'}
    lines = [
        f'{setup["loss"]}, forward and backward to the student',
        f'{"x".join(map(str, setup["shape"]))}, float32, {setup["device"]}, {setup["threads"]} thread(s), '
        f'{setup["repeats"]} interleaved repeats{steps}',
        '',
        *figures(result, [(labels[name], [name]) for name in result['seconds']]),
        '',
        f'{"bytes of both inputs":32}{inputs / 2**20:.0f} MiB',
    ]
    for name, peak in used.items():
        if peak is not None:
            ratio = result['memory_ratio']
            aim = f', aim <= {ratio["aim"]:.2f}: {ratio["verdict"]}' if name == 'ours' else ''
            lines.append(f'{f"peak memory / inputs, {name}":32}{peak / inputs:.3f}{aim}')
    if result['ratio'] is not None:
        lines.append(f'{"time, ours / plain":32}{verdict(result["ratio"])}')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the command line asks for, print a table per loss and write the JSON.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Returns:
        One result of :func:`measure` per loss.

    Raises:
        DistillError: The options do not fit.
    """
    parser = argparse.ArgumentParser(
        prog='benchmark.py',
        description='Time and peak memory of a loss between two dense maps against the plain formula.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        '--loss',
        nargs='*',
        metavar='NAME',
        default=argparse.SUPPRESS,
        help=f'{", ".join(map_losses())}; none: {DEFAULT}',
    )
    parser.add_argument('--shape', type=int, nargs=4, metavar=tuple('BCHW'), default=Setup.shape, help='of both maps')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--repeats', type=int, default=Setup.repeats, help='interleaved measurements')
    parser.add_argument('--steps', type=int, default=Setup.steps, help='steps per measurement')
    parser.add_argument('--threads', type=int, default=Setup.threads, help='threads of torch on the CPU')
    parser.add_argument('--no-memory', action='store_true', help='skip peak memory (one fresh process per variant)')
    parser.add_argument('--json', metavar='FILE', default=argparse.SUPPRESS, help='also write all figures')
    args = parser.parse_args(argv)
    options = dict(repeats=args.repeats, steps=args.steps, device=args.device, threads=args.threads)
    names = dict.fromkeys(getattr(args, 'loss', None) or [DEFAULT])
    setups = [Setup(name, tuple(args.shape), **options) for name in names]
    for setup in setups:
        variants(setup)
    info = machine()
    print(', '.join(f'{k} {v}' for k, v in info.items() if v is not None), flush=True)
    results = []
    for setup in setups:
        results.append(measure(setup, not args.no_memory))
        print('\n' + table(results[-1]), flush=True)
    if hasattr(args, 'json'):
        Path(args.json).write_text(json.dumps(dict(machine=info, losses=results), indent=1) + '\n')
    return results
