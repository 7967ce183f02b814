"""Measuring variants of a step against each other: interleaved in one process, medians and spread.

Two figures taken one after the other on a shared machine differ by more than what is to be measured. So every
repeat times every variant, in random order, and what is compared are the variants of one repeat.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_plugins.errors import DistillError

#: What torch itself says of operators whose result, or the size of it, the host must know before it can go on.
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
#: Indexing, which waits for masks only.
INDEXING = ('index', 'index_put', 'index_put_', '_index_put_impl_')
MASKS = (torch.bool, torch.uint8)


@dataclass(frozen=True)
class Moment:
    """A point in time, or what lies between two.

    Attributes:
        seconds: Of the clock on the wall.
        processor: Seconds that this process had the processor, which other processes do not lengthen.
    """

    seconds: float = 0.0
    processor: float = 0.0

    @classmethod
    def now(cls) -> Moment:
        """This point."""
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: Moment) -> Moment:
        return Moment(self.seconds - other.seconds, self.processor - other.processor)


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
        waiting: Those that the host waits for: on a GPU each one stalls the queue. Adam's counters, one per parameter,
            are among them, though they lie on the CPU beside a GPU too; a copy from the GPU shows on a GPU only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.waiting = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.total += 1
        self.waiting += _waits(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def _waits(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    name = function.overloadpacket.__name__
    if name in INDEXING:
        # One number goes where a mask is without anyone knowing how many places that are.
        return (name == 'index' or args[2].numel() > 1) and any(i is not None and i.dtype in MASKS for i in args[1])
    if name in ('copy_', '_to_copy'):
        source, target = (args[1].device, args[0].device) if name == 'copy_' else (args[0].device, kwargs.get('device'))
        return source.type != 'cpu' and target is not None and torch.device(target).type == 'cpu'
    return not WAITING.isdisjoint(function.tags)


def _give_back() -> None:
    """Give what was freed back to the system, where the C library can (glibc): it counts as used until then."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory(device: torch.device) -> int | None:
    """Bytes in use now.

    On CUDA the allocator's figure; on the CPU the resident set of the whole process, None where it cannot be read.
    """
    _give_back()
    return torch.cuda.memory_allocated(device) if device.type == 'cuda' else _resident('VmRSS:')


def highest_memory(step: Callable[[], object], steps: int, device: torch.device) -> int | None:
    """Highest number of bytes in use while some steps are made; None where it cannot be read.

    As in :func:`memory`. Not ``getrusage``: its maximum is inherited from the parent process and cannot be reset.
    """
    _give_back()
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


def bare_forward(networks: Iterable[nn.Module], step: Callable[[], object]) -> Callable[[], None]:
    """The least that teachers cost in a step: their outermost modules, called as they are called there.

    Whatever prepares their images, records and reads their outputs is left out.

    Args:
        networks: The teachers'.
        step: A step in which they run; made once.

    Returns:
        What repeats their forwards.

    Raises:
        DistillError: None did run.
    """
    calls: list[tuple[Callable[..., object], tuple, dict[str, Any], torch.autocast]] = []
    inside = False

    def recorded(forward: Callable[..., object]) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            nonlocal inside
            if inside:
                return forward(*args, **kwargs)
            kind = 'cuda' if torch.is_autocast_enabled('cuda') else 'cpu'
            dtype, on = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            calls.append((forward, args, kwargs, torch.autocast(kind, dtype, enabled=on)))
            inside = True
            try:
                return forward(*args, **kwargs)
            finally:
                inside = False

        return call

    # Not hooks: heads are called through `.forward`, and a program of TorchScript takes none.
    modules = [m for network in networks for m in network.modules() if not isinstance(m, torch.jit.ScriptModule)]
    own = [m.__dict__.get('forward') for m in modules]
    for module in modules:
        module.forward = recorded(module.forward)
    try:
        step()
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
    if not calls:
        raise DistillError('The teacher did not run in a distilled step, so there is nothing to compare it with.')

    @torch.no_grad()
    def forward_again() -> None:
        for forward, args, kwargs, autocast in calls:
            with autocast:
                forward(*args, **kwargs)

    return forward_again


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
