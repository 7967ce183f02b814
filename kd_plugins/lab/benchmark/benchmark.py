"""Variants of a training step next to each other, their table and whether it meets an aim: any benchmark."""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from kd_plugins.distiller import Session
from kd_plugins.errors import DistillError, nearest
from kd_plugins.lab.benchmark.measure import (
    Moment,
    Ratio,
    Spread,
    bare_forward,
    count_operators,
    highest_memory,
    in_new_process,
    interleave,
    machine,
    memory,
    milliseconds,
)

#: The variant that is only the forward of the network that teaches.
TEACHER = 'teacher'
#: Columns of the table in front of what was measured, and of what closes it.
WIDTH, LAST = 32, 30


@dataclass(frozen=True)
class Run:
    """A variant at its first step.

    Attributes:
        step: Makes one step.
        startup: What it took to get there.
        attaching: What of that `Pair.event` took, where distillation starts.
        teachers: The networks that teach it.
        facts: For the result.
    """

    step: Callable[[], object]
    startup: Moment = field(default_factory=Moment)
    attaching: Moment = field(default_factory=Moment)
    teachers: Sequence[nn.Module] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


#: Gets the runs by variant, while they last.
Use = Callable[[Mapping[str, Run]], Any]


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """One thing whose steps are measured.

    Attributes:
        repeats: Measurements per variant.
        steps: Steps per measurement.
        device: ``'cpu'`` or ``'cuda'``.
        threads: Threads of torch on the CPU.
        summary: For ``--help``, as ``epilog``.
        results: Key of the results in the JSON.
        ours: The variant that is judged.
        plain: The variant whose start-up is not distilled; None: nothing is started.
        rows: Label and variant of each row; several variants stand for their sum, the bound.
        aims: By key of the result: label, variants whose sum is compared with, and how many times that may be taken.
        sizes: Default on the CPU and on CUDA of every attribute that is a number, or several, on the command line.
        letters: What the numbers of a size are called there.
        warmup: Rounds that do not count.
    """

    repeats: int
    steps: int
    device: str
    threads: int = 1

    summary: ClassVar[str]
    epilog: ClassVar[str | None] = None
    results: ClassVar[str]
    ours: ClassVar[str]
    plain: ClassVar[str | None] = None
    rows: ClassVar[Mapping[str, Sequence[str]]]
    aims: ClassVar[Mapping[str, tuple[str, Sequence[str], float]]]
    sizes: ClassVar[Mapping[str, tuple[Any, Any]]]
    letters: ClassVar[Mapping[str, str]] = {}
    warmup: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            DistillError: A number is not positive, or the device is not there.
        """
        for name in (*self.sizes, 'threads'):
            value = getattr(self, name)
            lowest = value if isinstance(value, int) else min(value)
            if lowest < 1:
                raise DistillError(f'{name} must be at least 1, got {lowest}.')
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise DistillError('--device cuda: torch sees no CUDA device here; use --device cpu.')

    # ------------------------------------------------------------------ what a benchmark says
    @classmethod
    @abstractmethod
    def cases(cls, args: argparse.Namespace) -> list[Benchmark]:
        """What the command line asks for; `DistillError` when the options do not fit."""

    @abstractmethod
    def start(self, variants: Sequence[str], folder: Path, use: Use) -> Any:
        """Bring variants to their first step, in this order, and return what ``use`` returns for their runs.

        What they need is written to the folder by the first start, which is not timed, and read by the others.
        """

    @classmethod
    @abstractmethod
    def title(cls, result: Mapping[str, Any]) -> tuple[str, str, str]:
        """What was measured, the shape of its input, and the precision."""

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Versions of the frameworks by name."""
        return {}

    @property
    def variants(self) -> tuple[str, ...]:
        """What is measured, in the order in which it is started."""
        return tuple(dict.fromkeys(v for row in self.rows.values() for v in row))

    @property
    def setup(self) -> dict[str, Any]:
        """What is measured and how, for the result."""
        return asdict(self)

    def before_memory(self) -> None:
        """Load what counts for none of the variants."""
        gc.collect()

    @classmethod
    def label(cls, row: str, result: Mapping[str, Any]) -> str:
        """What the table calls a row."""
        return row

    @classmethod
    def closing(cls, result: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Label and text of the last lines of the table."""
        return [(label, verdict(result[key])) for key, (label, *_) in cls.aims.items() if result[key] is not None]

    # ------------------------------------------------------------------ from the command line
    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """The options that it has."""
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        parser.add_argument('--device', choices=('cpu', 'cuda'), default=device, help=f'(default: {device})')
        words = dict(repeats='interleaved measurements ', steps='steps per measurement ', shape='of both maps ')
        for name, defaults in cls.sizes.items():
            letters = cls.letters.get(name, '')
            shown = [' '.join(map(str, d)) if isinstance(d, tuple) else str(d) for d in defaults]
            text = shown[0] if shown[0] == shown[1] else f'{shown[0]} on the CPU, {shown[1]} on CUDA'
            parser.add_argument(
                f'--{name.replace("_", "-")}',
                type=int,
                nargs=len(letters) if len(letters) > 1 else None,
                metavar=tuple(letters) if len(letters) > 1 else letters or None,
                help=f'{words.get(name, "")}(default: {text})',
            )
        parser.add_argument('--threads', type=int, default=1, help='threads of torch on the CPU (default: 1)')
        parser.add_argument('--no-memory', action='store_true', help='skip peak memory (one fresh process per variant)')
        parser.add_argument(
            '--operators',
            action='store_true',
            help='count operators and host waits per step; time start-ups only',
        )
        parser.add_argument('--json', metavar='FILE', help='also write all figures')

    @classmethod
    def options(cls, args: argparse.Namespace, sizes: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
        """Attributes that the command line gave, and the defaults of its device for the rest."""
        on_gpu = args.device == 'cuda'
        chosen = {k: v[on_gpu] if getattr(args, k) is None else getattr(args, k) for k, v in sizes.items()}
        numbers = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
        return dict(numbers, device=args.device, threads=args.threads)

    # ------------------------------------------------------------------ measuring
    def measure(self, timed: bool = True, with_memory: bool = True) -> dict[str, Any]:
        """Measure it.

        Args:
            timed: Time the steps; otherwise operators are counted, and start-ups timed again and again.
            with_memory: Measure peak memory too, each variant in a process of its own.

        Returns:
            Plain data: ``setup``; ``seconds`` per variant (median, low, high, all), the ``bound`` and a ratio per key
            of ``aims`` (value, low, high, aim, verdict), None where not timed; ``operators`` and ``waiting`` per
            variant; ``memory`` (bytes per variant or None); ``startup``: what distillation adds, and what its event
            takes, on the wall's clock and of the processor, or None.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            starts = self._starts(folder, 0 if timed else self.repeats - 1)

            def count(steps: Mapping[str, Callable[[], object]], runs: Mapping[str, Run]) -> tuple:
                wait = torch.cuda.synchronize if self.device == 'cuda' else None
                repeats = self.repeats if timed else 0
                seconds = interleave(steps, repeats, warmup=self.warmup, steps=self.steps, synchronize=wait)
                starts.append(self._startup(runs))
                return seconds, {v: count_operators(step) for v, step in steps.items()}, runs[self.ours].facts

            seconds, counts, facts = self.with_steps(self.variants, folder, count)
            gc.collect()
            used = {v: in_new_process(peak_memory, self, v, folder) for v in self.variants} if with_memory else None
        result = dict(
            setup=self.setup,
            seconds={v: _spread(x) for v, x in seconds.items()} if timed else None,
            bound=None,
            operators={v: count.total for v, count in counts.items()},
            waiting={v: count.waiting for v, count in counts.items()},
            memory=used,
            startup=None,
            **facts,
        )
        if self.plain is not None:
            result['startup'] = {k: _spread([x[k] for x in starts]) for k in starts[0]}
        for key, (_, others, aim) in self.aims.items():
            result[key] = None
            if timed and set(others) <= set(seconds):
                total = [sum(values) for values in zip(*(seconds[v] for v in others), strict=True)]
                result[key] = judged(Ratio.of(seconds[self.ours], total), aim)
                if len(others) > 1:
                    result['bound'] = _spread(total)
        return result

    def with_steps(self, variants: Sequence[str], folder: Path, use: Callable[[dict, Mapping[str, Run]], Any]) -> Any:
        """Start what variants need, and return what ``use`` makes of their steps and the runs."""

        def started(runs: Mapping[str, Run]) -> Any:
            # Ultralytics sets its own number when it chooses the device.
            torch.set_num_threads(self.threads)
            steps = {v: runs[v].step for v in variants if v != TEACHER}
            if TEACHER in variants:
                steps[TEACHER] = bare_forward(runs[self.ours].teachers, runs[self.ours].step)
            return use(steps, runs)

        torch.set_num_threads(self.threads)
        return self.start(list(dict.fromkeys(self.ours if v == TEACHER else v for v in variants)), folder, started)

    def _starts(self, folder: Path, number: int) -> list[dict[str, float]]:
        if self.plain is None:
            return []
        # Once for nothing: what is slow the first time must not count as one variant's start-up.
        self.with_steps([self.plain], folder, lambda steps, runs: None)
        found = []
        for i in range(number):
            order = [self.plain, self.ours] if i % 2 else [self.ours, self.plain]
            found.append(self.with_steps(order, folder, lambda steps, runs: self._startup(runs)))
            gc.collect()
        return found

    def _startup(self, runs: Mapping[str, Run]) -> dict[str, float]:
        if self.plain is None:
            return {}
        ours = runs[self.ours]
        spans = dict(added=ours.startup - runs[self.plain].startup, attaching=ours.attaching)
        return {f'{name}_{clock}': x for name, span in spans.items() for clock, x in asdict(span).items()}

    # ------------------------------------------------------------------ report
    @classmethod
    def table(cls, result: Mapping[str, Any]) -> str:
        """What :meth:`measure` returned, for people."""
        setup, (title, shape, precision) = result['setup'], cls.title(result)
        facts = [shape, precision, setup['device'], f'{setup["threads"]} thread(s)']
        if result['seconds'] is not None:
            steps = f' of {setup["steps"]} steps' if setup['steps'] > 1 else ''
            facts.append(f'{setup["repeats"]} interleaved repeats{steps}')
        closing = cls.closing(result)
        width = max([LAST, *(len(label) for label, _ in closing)])
        last = [f'{label:{width}}  {text}' for label, text in closing]
        return '\n'.join([title, ', '.join(facts), '', *cls._figures(result), '', *last]).rstrip()

    @classmethod
    def _figures(cls, result: Mapping[str, Any]) -> list[str]:
        """Time, memory and operators of every variant."""
        timed = result['seconds'] is not None
        times = f'{"median":>10}{"quartiles":>22}{"peak memory":>14}' if timed else ''
        lines = [f'{"":{WIDTH}}{times}{"operators":>11}{"host waits":>12}']
        for row, names in cls.rows.items():
            if not set(names) <= set(result['operators']):
                continue
            if timed:
                spread, used = result['bound'], ''
                if len(names) == 1:
                    spread, peak = result['seconds'][names[0]], (result['memory'] or {}).get(names[0])
                    used = '-' if peak is None else f'{peak / 2**20:.0f} MiB'
                quartiles = f'{milliseconds(spread["low"])} - {milliseconds(spread["high"])}'
                times = f'{milliseconds(spread["median"]):>10}{quartiles:>22}{used:>14}'
            operators, waits = (sum(result[k][n] for n in names) for k in ('operators', 'waiting'))
            lines.append(f'{cls.label(row, result):{WIDTH}}{times}{operators:>11}{waits:>12}')
        return lines


def end_distillation(session: Session) -> None:
    """Go to where the window of a session is over, which releases its teachers."""
    stop = session.window.stop
    assert stop is not None
    session.begin_iteration(replace(session.position, unit=stop))
    assert not session.teachers and not session.active


@dataclass(frozen=True, kw_only=True)
class Pair(Benchmark):
    """A student that a teacher distils. The lower bound of its step is the plain step plus the teacher's bare forward.

    Attributes:
        student: What is trained.
        teacher: What teaches it.
        batch_size: Images per step.
        amp: Automatic mixed precision, as the framework does it (CUDA only).
        pairs: Ready ones by name: the values of ``own``.
        own: Attributes that make a pair, and what they are, for the help.
        event: Where distillation starts.
        includes: What it does there.
    """

    student: str
    teacher: str
    batch_size: int
    amp: bool = False

    results: ClassVar[str] = 'pairs'
    ours: ClassVar[str] = 'distilled'
    pairs: ClassVar[Mapping[str, Sequence[str]]]
    own: ClassVar[Mapping[str, tuple[str, str]]]
    event: ClassVar[str]
    includes: ClassVar[str]

    def __post_init__(self) -> None:
        """As for every benchmark; and mixed precision needs a GPU."""
        super().__post_init__()
        if self.amp and self.device == 'cpu':
            raise DistillError('--amp needs --device cuda: it is measured in float16.')

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """As for every benchmark; and ``--pair``, or a pair of one's own."""
        super().add_options(parser)
        names = f'{", ".join(cls.pairs)} or all; may be repeated (default: {next(iter(cls.pairs))})'
        parser.add_argument('--pair', action='append', metavar='NAME', help=names)
        group = parser.add_argument_group('a pair of your own')
        for name, (metavar, text) in cls.own.items():
            group.add_argument(f'--{name}', metavar=metavar, help=text)
        parser.add_argument('--amp', action='store_true', help='automatic mixed precision (CUDA)')

    @classmethod
    def chosen(cls, args: argparse.Namespace) -> list[dict[str, str]]:
        """Attributes of the pairs that the command line names.

        Raises:
            DistillError: It names none, or a pair by half.
        """
        given = {name: getattr(args, name) for name in cls.own}
        missing = [f'--{name}' for name, value in given.items() if not value]
        *others, last = (f'--{name}' for name in cls.own)
        every = f'{", ".join(others)} and {last}'
        if not missing:
            if args.pair:
                raise DistillError(f'--pair names a ready pair; leave it out together with {every}.')
            return [given]
        if len(missing) < len(given):
            raise DistillError(f'{every} go together; {" and ".join(missing)} is missing.')
        names = args.pair or [next(iter(cls.pairs))]
        for name in names:
            if name not in (*cls.pairs, 'all'):
                raise DistillError(f'--pair {name!r} is unknown; {nearest(name, [*cls.pairs, "all"])}')
        chosen = cls.pairs if 'all' in names else dict.fromkeys(names)
        return [dict(zip(cls.own, cls.pairs[name], strict=True)) for name in chosen]

    @classmethod
    def closing(cls, result: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The ratios, and what distillation adds before the first step."""
        lines, startup = super().closing(result), result['startup']
        if result['seconds'] is not None:
            return [*lines, ('start-up', f'+{startup["added_seconds"]["median"]:.1f} s ({cls.includes})')]

        def text(name: str) -> str:
            wall, own = (startup[f'{name}_{clock}'] for clock in ('seconds', 'processor'))
            shown = (f'{x["median"]:.2f} s  (quartiles {x["low"]:.2f} - {x["high"]:.2f})' for x in (wall, own))
            return '{}, processor {}'.format(*shown)

        repeats = len(startup['added_seconds']['all'])
        return [(f'start-up +, median of {repeats}', text('added')), (cls.event, text('attaching'))]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {**asdict(Spread.of(values)), 'all': list(values)}


def judged(ratio: Ratio, aim: float) -> dict[str, Any]:
    """A ratio and whether it meets an aim, as plain data."""
    return {**asdict(ratio), 'aim': aim, 'verdict': ratio.verdict(aim)}


def verdict(ratio: Mapping[str, Any]) -> str:
    """A ratio with its interval, and whether its ``aim`` is met."""
    return (
        f'{ratio["value"]:.3f}  (95 % interval {ratio["low"]:.3f} - {ratio["high"]:.3f}), '
        f'aim <= {ratio["aim"]:.2f}: {ratio["verdict"]}'
    )


def peak_memory(case: Benchmark, variant: str, folder: Path, steps: int = 3) -> int | None:
    """Peak bytes that a variant adds to the process, weights and optimizer state included.

    Meant for a fresh process: what an allocator once had, it keeps. On the CPU it is the process that grows. A
    teacher's figure includes the idle student that it is attached to.
    """
    torch.set_num_threads(case.threads)
    case.before_memory()
    device = torch.device(case.device)
    before = memory(device)
    peak = case.with_steps([variant], folder, lambda made, runs: highest_memory(made[variant], steps, device))
    return None if peak is None or before is None else peak - before


def run(kind: type[Benchmark], argv: Sequence[str] | None, own: Callable[[argparse.ArgumentParser], None]) -> list:
    """Measure what a command line asks for, print a table for each and write the JSON.

    Args:
        kind: What is measured.
        argv: The command line.
        own: Adds the options that chose ``kind``.

    Returns:
        The results of :meth:`Benchmark.measure`.

    Raises:
        DistillError: The options do not fit, or something cannot be measured.
    """
    parser = argparse.ArgumentParser(prog='kd-plugins benchmark', description=kind.summary, epilog=kind.epilog)
    own(parser)
    kind.add_options(parser)
    args = parser.parse_args(argv)
    info = machine(**kind.versions())
    cases = kind.cases(args)
    print(', '.join(f'{k} {v}' for k, v in info.items() if v is not None), flush=True)
    results = []
    for case in cases:
        results.append(case.measure(not args.operators, not (args.operators or args.no_memory)))
        print('\n' + kind.table(results[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({'machine': info, kind.results: results}, indent=1) + '\n')
    return results
