"""Measuring variants of a step against each other: interleaved in one process, medians and spread.

Two figures taken one after the other on a shared machine differ by more than what is to be measured. So every
repeat times every variant, in random order, and what is compared are the variants of one repeat.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kd_plugins.errors import DistillError

#: Operators whose result the host waits for: on a GPU each one stalls the queue.
WAITING = ('_local_scalar_dense', 'nonzero', 'masked_select', 'is_nonzero', 'equal', 'item')


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements.

    Attributes:
        median: Second quartile.
        low: First quartile.
        high: Third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The quartiles of at least one value, linearly interpolated."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method='inclusive')
        return cls(median, low, high)


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios, with a confidence interval.

    Attributes:
        value: The median.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(
        cls, above: Sequence[float], below: Sequence[float], level: float = 0.95, resamples: int = 5000, seed: int = 0
    ) -> Ratio:
        """Median of ``above[i] / below[i]`` and its percentile bootstrap interval over the repeats.

        Args:
            above: One value per repeat.
            below: One value > 0 per repeat, measured next to it.
            level: Confidence level in (0, 1).
            resamples: Number of bootstrap samples.
            seed: Of the resampling.

        Raises:
            DistillError: The two are not paired.
        """
        if len(above) != len(below) or not above:
            raise DistillError(f'A ratio needs paired measurements, got {len(above)} and {len(below)}.')
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        draw = random.Random(seed)
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
        tail = (1 - level) / 2
        last = resamples - 1
        return cls(statistics.median(ratios), medians[round(tail * last)], medians[round((1 - tail) * last)])

    def verdict(self, aim: float) -> str:
        """Whether the ratio is at most ``aim``: ``'met'``, ``'missed'``, or ``'undecided'`` inside the interval."""
        if self.high <= aim:
            return 'met'
        return 'missed' if self.low > aim else 'undecided'


def interleave(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 2,
    steps: int = 1,
    synchronize: Callable[[], object] | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds per step of every variant in every repeat.

    The garbage collector is off while a variant runs; it collects between repeats.

    Args:
        variants: What to time, by name.
        repeats: How often every variant is timed.
        warmup: Rounds over all variants before the first one that counts.
        steps: Calls per measurement; on a GPU more than 1, so that the queue fills as it does in a run.
        synchronize: Waits for the device (``torch.cuda.synchronize``); None where calls return when they are done.
        seed: Of the order of the variants, which is random in each repeat.

    Returns:
        ``repeats`` values per variant; equal positions were measured next to each other.
    """
    wait = synchronize or (lambda: None)
    draw = random.Random(seed)
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for repeat in range(-warmup, repeats):
            draw.shuffle(names)
            for name in names:
                run = variants[name]
                wait()
                start = time.perf_counter()
                for _ in range(steps):
                    run()
                wait()
                if repeat >= 0:
                    seconds[name].append((time.perf_counter() - start) / steps)
            gc.collect()
    finally:
        if enabled:
            gc.enable()
    return seconds


class Operators(TorchDispatchMode):
    """Counts the operators that a block of code dispatches: on a GPU about one kernel launch each.

    Unlike seconds the counts do not vary, so they show what a change saves on a busy machine.

    Attributes:
        total: Operators dispatched, views included.
        waiting: Those whose result the host waits for. Adam's counters, one per parameter, are among them, though
            they lie on the CPU beside a GPU too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.waiting = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.total += 1
        self.waiting += function.overloadpacket.__name__ in WAITING
        return function(*args, **(kwargs or {}))


def memory(device: torch.device) -> int | None:
    """Bytes in use now.

    On CUDA the allocator's figure; on the CPU the resident set of the whole process, None where it cannot be read.
    """
    return torch.cuda.memory_allocated(device) if device.type == 'cuda' else _resident('VmRSS:')


def highest_memory(step: Callable[[], object], steps: int, device: torch.device) -> int | None:
    """Highest number of bytes in use while some steps are made; None where it cannot be read.

    As in :func:`memory`. Not ``getrusage``: its maximum is inherited from the parent process and cannot be reset.
    """
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path('/proc/self/clear_refs').write_text('5')  # the highest mark is now the current one
        except OSError:
            return None
    for _ in range(steps):
        step()
    return torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else _resident('VmHWM:')


def _resident(key: str) -> int | None:
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def count_operators(step: Callable[[], object]) -> Operators:
    """The operators that one call dispatches."""
    with Operators() as count:
        step()
    return count


def random_boxes(number: int, size: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Boxes as natural images have them: small ones prevail.

    Args:
        number: How many.
        size: ``(2,)`` width and height of the image.
        draw: Generator.

    Returns:
        ``(number, 4)`` x1, y1, x2, y2; sides are log-uniform from 3 % to 80 % of the image's.
    """
    sides = size * 0.03 * (0.8 / 0.03) ** torch.rand(number, 2, generator=draw)
    corner = torch.rand(number, 2, generator=draw) * (size - sides)
    return torch.cat([corner, corner + sides], 1)


def milliseconds(seconds: float) -> str:
    """A duration with three digits."""
    digits = max(0, 2 - math.floor(math.log10(seconds * 1e3))) if seconds > 0 else 0
    return f'{seconds * 1e3:.{min(digits, 3)}f} ms'


def cpu_name() -> str:
    """Name of the processor."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')), platform.machine())


def machine(**versions: str) -> dict[str, object]:
    """What figures were taken on.

    Args:
        **versions: Of the frameworks, by name.
    """
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        **versions,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cpu=cpu_name(),
        cores=os.cpu_count(),
        load=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
    )


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of a module in a fresh process: what an allocator once had, it keeps."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *args).result()


def add_options(parser: argparse.ArgumentParser, sizes: Mapping[str, tuple[Any, Any]]) -> None:
    """The options that every benchmark has.

    Args:
        parser: Where they are added.
        sizes: Values on the CPU and on CUDA of ``image_size``, ``batch_size``, ``repeats`` and ``steps``, for the help.
    """

    def text(name: str) -> str:
        on_cpu, on_gpu = (' '.join(map(str, v)) if isinstance(v, tuple) else v for v in sizes[name])
        return f'(default: {on_cpu} on the CPU, {on_gpu} on CUDA)'

    rectangle = isinstance(sizes['image_size'][0], tuple)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--image-size',
        type=int,
        nargs=2 if rectangle else None,
        metavar=('H', 'W') if rectangle else 'S',
        help=text('image_size'),
    )
    parser.add_argument('--batch-size', type=int, help=text('batch_size'))
    parser.add_argument('--repeats', type=int, help=text('repeats'))
    parser.add_argument('--steps', type=int, help='steps per measurement ' + text('steps'))
    parser.add_argument('--threads', type=int, default=1, help='threads of torch on the CPU')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (CUDA)')
    parser.add_argument('--no-memory', action='store_true', help='skip peak memory (one fresh process per variant)')
    parser.add_argument('--json', metavar='FILE', help='also write all figures')


def chosen_sizes(args: argparse.Namespace, sizes: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """What the command line gave, and the defaults of its device for the rest; see :func:`add_options`."""
    return {k: v[args.device == 'cuda'] if getattr(args, k) is None else getattr(args, k) for k, v in sizes.items()}


def figures(result: Mapping[str, Any], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Lines of a table: time, memory and operators of every variant.

    Args:
        result: With ``seconds``, ``operators`` and ``waiting`` by variant, ``memory`` by variant or None, and the
            ``bound``.
        rows: Label and variant; two variants stand for the bound, their sum.
    """
    lines = [f'{"":32}{"median":>10}{"quartiles":>22}{"peak memory":>14}{"operators":>11}{"host waits":>12}']
    for label, names in rows:
        spread, used = result['bound'], ''
        if len(names) == 1:
            spread, peak = result['seconds'][names[0]], (result['memory'] or {}).get(names[0])
            used = '-' if peak is None else f'{peak / 2**20:.0f} MiB'
        quartiles = f'{milliseconds(spread["low"])} - {milliseconds(spread["high"])}'
        operators, waits = (sum(result[k][n] for n in names) for k in ('operators', 'waiting'))
        lines.append(
            f'{label:32}{milliseconds(spread["median"]):>10}{quartiles:>22}{used:>14}{operators:>11}{waits:>12}'
        )
    return lines


def verdict(ratio: Mapping[str, Any]) -> str:
    """A ratio with its interval, and whether its ``aim`` is met."""
    return (
        f'{ratio["value"]:.3f}  (95 % interval {ratio["low"]:.3f} - {ratio["high"]:.3f}), '
        f'aim <= {ratio["aim"]:.2f}: {ratio["verdict"]}'
    )
