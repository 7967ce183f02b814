"""How a weight or temperature changes over a run, and in which part of it a term is on."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

from kd_plugins.errors import DistillError, check_keys, in_words, nearest

#: What times are given in, and what they are of.
BY = {'fraction': 'of the run', 'epochs': 'epochs', 'iterations': 'iterations'}


@dataclass(frozen=True)
class Position:
    """Where in the run the next iteration is.

    Attributes:
        iteration: Iterations done.
        max_iterations: Iterations of the whole run.
        unit: Epochs done in an epoch-based run, otherwise iterations: what ``start`` and ``stop`` are counted in.
        epoch: Epochs done, with the part of the current one; None: the run does not count epochs.
        epochs: Epochs of the whole run; None likewise.
    """

    iteration: float = 0
    max_iterations: float = 1
    unit: int = 0
    epoch: float | None = None
    epochs: float | None = None

    @property
    def progress(self) -> float:
        """Fraction of the run that is done, in [0, 1]."""
        return min(self.iteration / max(self.max_iterations, 1), 1.0)

    @property
    def end(self) -> Position:
        """The end of the run."""
        return replace(self, iteration=self.max_iterations, epoch=self.epochs)

    def time(self, by: str) -> float:
        """The time that has passed.

        Args:
            by: ``'fraction'`` of the run, ``'epochs'`` or ``'iterations'``.

        Raises:
            DistillError: In epochs, in a run that does not count them.
        """
        if by == 'fraction':
            return self.progress
        if by == 'iterations':
            return self.iteration
        if self.epoch is None:
            raise DistillError("this run counts iterations, not epochs; write by='iterations' or by='fraction'.")
        return self.epoch


class Schedule(Protocol):
    """A value over the run. ``str()`` of it says it in the summary."""

    def __call__(self, position: Position) -> float:
        """The value in the iteration at this position."""
        ...


#: ``number(value, where)`` checks a value of the schedule against the limits of what is scheduled.
Number = Callable[[Any, str], float]
Parser = Callable[[dict[str, Any], str, Number], Schedule]
_PARSERS: dict[str, Parser] = {}


def register_schedule(name: str) -> Callable[[Parser], Parser]:
    """Decorator: ``function(options, where, number) -> Schedule`` reads ``dict(type=name, **options)``.

    Args:
        name: What is written as ``type``.
    """

    def decorate(function: Parser) -> Parser:
        _PARSERS[name] = function
        return function

    return decorate


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float

    def __call__(self, position: Position) -> float:
        return self.value

    def __str__(self) -> str:
        return f'{self.value:g}'


@dataclass(frozen=True)
class Ramp:
    """From ``start`` to ``end`` between two times, constant outside.

    Args:
        start: Value at and before ``begin``.
        end: Value at and after ``until``.
        begin: Time at which the change begins.
        until: Time at which the change is complete.
        shape: ``'linear'`` or ``'cosine'``.
        by: What times are in, one of `BY`.
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0
    shape: str = 'linear'
    by: str = 'fraction'

    def __call__(self, position: Position) -> float:
        x = min(max((position.time(self.by) - self.begin) / (self.until - self.begin), 0.0), 1.0)
        if x == 1:
            return self.end
        if self.shape == 'cosine':
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start + (self.end - self.start) * x

    def ended(self, position: Position) -> bool:
        """See `ended`."""
        return self.end == 0 and position.time(self.by) >= self.until

    def __str__(self) -> str:
        return f'{self.start:g} -> {self.end:g} ({self.shape}, {self.begin:g} to {self.until:g} {BY[self.by]})'


@dataclass(frozen=True)
class Reciprocal:
    """One over a straight line: from ``start`` to ``end``, quickly at first where it falls.

    Of a temperature ``T`` that falls to 1 it is the annealing of Jafari et al., "Annealing Knowledge Distillation"
    (EACL 2021, arXiv 2104.07163), in which the teacher's logits are multiplied by a factor ``1 / T`` that rises evenly.

    Args:
        start: Value at and before ``begin``, above 0.
        end: Value at and after ``until``, above 0.
        begin: Time at which the change begins.
        until: Time at which the change is complete.
        by: What times are in, one of `BY`.
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0
    by: str = 'fraction'

    def __call__(self, position: Position) -> float:
        return 1 / Ramp(1 / self.start, 1 / self.end, self.begin, self.until, by=self.by)(position)

    def __str__(self) -> str:
        return f'{self.start:g} -> {self.end:g} (reciprocal, {self.begin:g} to {self.until:g} {BY[self.by]})'


@dataclass(frozen=True)
class Exponential:
    """``start * gamma ** t`` with the whole units of time ``t`` that have passed, but no less than ``end``.

    The classic decay of distillation is ``gamma=0.99`` per epoch.

    Args:
        start: First value.
        gamma: Factor of each unit, in (0, 1]; of the whole run where times are fractions of it.
        end: Smallest value.
        by: What times are in, one of `BY`.
    """

    start: float
    gamma: float
    end: float = 0.0
    by: str = 'epochs'

    def __call__(self, position: Position) -> float:
        time = position.time(self.by)
        return max(self.end, self.start * self.gamma ** (time if self.by == 'fraction' else math.floor(time)))

    def __str__(self) -> str:
        least = f', at least {self.end:g}' if self.end else ''
        unit = 'over the run' if self.by == 'fraction' else f'per {self.by.removesuffix("s")}'
        return f'{self.start:g}, times {self.gamma:g} {unit}{least}'


@dataclass(frozen=True)
class Step:
    """``start``, multiplied by ``gamma`` at every milestone.

    Args:
        start: First value.
        gamma: Factor, above 0.
        milestones: Times, ascending.
        by: What times are in, one of `BY`.
    """

    start: float
    gamma: float
    milestones: tuple[float, ...]
    by: str = 'fraction'

    def __call__(self, position: Position) -> float:
        time = position.time(self.by)
        return self.start * self.gamma ** sum(time >= m for m in self.milestones)

    def __str__(self) -> str:
        return f'{self.start:g}, times {self.gamma:g} at {", ".join(f"{m:g}" for m in self.milestones)} {BY[self.by]}'


@dataclass(frozen=True)
class Piecewise:
    """Straight lines between points, constant outside of them.

    Args:
        points: ``(time, value)``, times ascending; two of one time are a jump, after which the second holds.
        by: What times are in, one of `BY`.
    """

    points: tuple[tuple[float, float], ...]
    by: str = 'fraction'

    def __call__(self, position: Position) -> float:
        time = position.time(self.by)
        at = bisect.bisect_right([t for t, _ in self.points], time)
        if at == 0 or at == len(self.points):
            return self.points[max(at - 1, 0)][1]
        (left, low), (right, high) = self.points[at - 1], self.points[at]
        return low + (high - low) * (time - left) / (right - left)

    def ended(self, position: Position) -> bool:
        """See `ended`."""
        time = position.time(self.by)
        return self(position) == 0 and all(value == 0 for at, value in self.points if at > time)

    def __str__(self) -> str:
        return ', '.join(f'{value:g} at {time:g}' for time, value in self.points) + f' {BY[self.by]}'


@dataclass(frozen=True)
class WarmUp:
    """Another schedule, of which the beginning is a ramp from 0.

    Args:
        value: The other schedule.
        until: Time from which on it counts in full.
        by: What times are in, one of `BY`.
    """

    value: Schedule
    until: float
    by: str = 'fraction'

    def __call__(self, position: Position) -> float:
        return self.value(position) * min(position.time(self.by) / self.until, 1.0)

    def ended(self, position: Position) -> bool:
        """See `ended`."""
        return ended(self.value, position)

    def __str__(self) -> str:
        return f'{self.value}, warmed up until {self.until:g} {BY[self.by]}'


@dataclass(frozen=True)
class Window:
    """From which epoch (iteration in an iteration-based run) on, and up to which, something is on.

    Args:
        start: The first one, counted from 0.
        stop: The first one without it again; None: to the end.

    Raises:
        DistillError: They are no whole numbers, or leave nothing in between.
    """

    start: int = 0
    stop: int | None = None

    def __call__(self, unit: int) -> bool:
        return unit >= self.start and (self.stop is None or unit < self.stop)

    def __str__(self) -> str:
        return f'from {self.start} ' + ('to the end' if self.stop is None else f'up to {self.stop}')


def build_window(start: Any, stop: Any, where: str = '') -> Window:
    """Read ``start`` and ``stop`` from a config; None as ``start`` is 0.

    Args:
        start: See `Window`.
        stop: See `Window`.
        where: Stands in front of the message, e.g. ``"term 'logits': "``.

    Raises:
        DistillError: See `Window`.
    """
    for key, value in (('start', start), ('stop', stop)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise DistillError(
                f'{where}{key} must be a whole number of epochs (iterations in an IterBasedTrainLoop), got {value!r}.'
            )
    if stop is not None and stop <= (start or 0):
        raise DistillError(f'{where}stop ({stop}) must come after start ({start or 0}).')
    return Window(start or 0, stop)


def check_number(value: Any, where: str, low: float = 0.0, strict: bool = False) -> float:
    """A finite number, at least (or more than) ``low``.

    Raises:
        DistillError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DistillError(f'{where} must be a number or a schedule, got {value!r}.')
    if not math.isfinite(value) or value < low or (strict and value <= low):
        raise DistillError(f'{where} must be a finite number {">" if strict else ">="} {low:g}, got {value!r}.')
    return float(value)


def build_schedule(
    value: Any, where: str, low: float = 0.0, strict: bool = False, more: Mapping[str, Parser] | None = None
) -> Schedule:
    """Read a schedule from its spelling in a config.

    Args:
        value: A number, or ``dict(type=..., by='fraction' | 'epochs' | 'iterations')``, of which ``by`` says what times
            are in: ``linear`` and ``cosine`` (``start``, ``end``, ``begin=0``, ``until=1.0``), ``exponential``
            (``start``, ``gamma``, ``end=0``; by epochs), ``step`` (``start``, ``gamma``, ``milestones``), ``piecewise``
            (``points=[[time, value], ...]``), ``warmup`` (``value``, a number or another schedule, ``until``),
            ``constant`` (``value``), or another ``type`` that `register_schedule` made known.
        where: What it is, for error messages, e.g. ``"term 'logits': weight"``.
        low: Smallest allowed value.
        strict: Whether ``low`` itself is excluded.
        more: Types that are known here besides, but not inside another schedule.

    Raises:
        DistillError: The spelling is wrong or a value is out of range.
    """

    def number(found: Any, place: str) -> float:
        return check_number(found, place, low, strict)

    return _read(value, where, number, {**_PARSERS, **(more or {})})


def _read(value: Any, where: str, number: Number, parsers: Mapping[str, Parser]) -> Schedule:
    if not isinstance(value, Mapping):
        return Constant(number(value, where))
    options = dict(value)
    kind = options.pop('type', None)
    if kind not in parsers:
        raise DistillError(f'{where} has no schedule type {kind!r}: {nearest(kind, parsers)}')
    try:
        return parsers[kind](options, where, number)
    except DistillError:
        raise
    except Exception as error:
        raise DistillError(f'{where} ({kind} schedule) does not take these options: {in_words(error)}.') from error


def _times(options: Mapping[str, Any], where: str, default: str = 'fraction') -> tuple[str, Number]:
    """What times are in, and what checks one."""
    by = options.get('by', default)
    if by not in BY:
        raise DistillError(f"{where}.by must be 'fraction' (of the run), 'epochs' or 'iterations', got {by!r}.")

    def time(value: Any, key: str) -> float:
        found = check_number(value, f'{where}.{key}')
        if by == 'fraction' and found > 1:
            raise DistillError(
                f"{where}.{key} is a fraction of the run, so at most 1, got {found:g}; write by='epochs' or "
                "by='iterations' for times in these."
            )
        return found

    return by, time


def _take(options: Mapping[str, Any], where: str, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    check_keys(options, (*needed, *optional, 'by'), where)
    missing = [key for key in needed if key not in options]
    if missing:
        raise DistillError(f'{where} needs {_in_list(needed)}; {missing[0]!r} is missing.')


def _in_list(names: Sequence[str]) -> str:
    """``'a', 'b' and 'c'``."""
    *first, last = map(repr, names)
    return f'{", ".join(first)} and {last}' if first else last


def _ramp(shape: str) -> Parser:
    def parse(options: dict[str, Any], where: str, number: Number) -> Schedule:
        _take(options, f'{where} ({shape} schedule)', ('start', 'end'), ('begin', 'until'))
        by, time = _times(options, where)
        if by != 'fraction' and 'until' not in options:
            raise DistillError(f"{where} needs 'until', in {by}.")
        found = {key: number(options[key], f'{where}.{key}') for key in ('start', 'end')}
        begin, until = time(options.get('begin', 0.0), 'begin'), time(options.get('until', 1.0), 'until')
        if not begin < until:
            raise DistillError(f'{where}: begin must come before until, got {begin:g} and {until:g}.')
        if shape != 'reciprocal':
            return Ramp(**found, begin=begin, until=until, shape=shape, by=by)
        zero = next((key for key, value in found.items() if not value), None)
        if zero is not None:
            raise DistillError(f'{where}.{zero} must be above 0, because one over it changes evenly.')
        return Reciprocal(**found, begin=begin, until=until, by=by)

    return parse


for _shape in ('linear', 'cosine', 'reciprocal'):
    register_schedule(_shape)(_ramp(_shape))


def _factor(value: Any, where: str, most: float = math.inf) -> float:
    found = check_number(value, where, 0.0, strict=True)
    if found > most:
        raise DistillError(f'{where} must be in (0, {most:g}], got {found:g}.')
    return found


@register_schedule('constant')
def _constant(options: dict[str, Any], where: str, number: Number) -> Schedule:
    check_keys(options, ('value',), f'{where} (constant schedule)')
    if 'value' not in options:
        raise DistillError(f"{where} (constant schedule) needs 'value'.")
    return Constant(number(options['value'], f'{where}.value'))


@register_schedule('exponential')
def _exponential(options: dict[str, Any], where: str, number: Number) -> Schedule:
    _take(options, f'{where} (exponential schedule)', ('start', 'gamma'), ('end',))
    by, _ = _times(options, where, 'epochs')
    # What must not be 0 must not come near it.
    end = number(options.get('end', 0.0), f'{where}.end')
    start, gamma = number(options['start'], f'{where}.start'), _factor(options['gamma'], f'{where}.gamma', 1)
    return Exponential(start, gamma, end, by)


@register_schedule('step')
def _step(options: dict[str, Any], where: str, number: Number) -> Schedule:
    _take(options, f'{where} (step schedule)', ('start', 'gamma', 'milestones'))
    by, time = _times(options, where)
    given = options['milestones']
    if not isinstance(given, (list, tuple)) or not given:
        raise DistillError(f'{where}.milestones must be a list of times, got {given!r}.')
    times = tuple(time(t, 'milestones') for t in given)
    if any(a >= b for a, b in pairwise(times)):
        raise DistillError(f'{where}.milestones must ascend, got {given!r}.')
    return Step(number(options['start'], f'{where}.start'), _factor(options['gamma'], f'{where}.gamma'), times, by)


@register_schedule('piecewise')
def _piecewise(options: dict[str, Any], where: str, number: Number) -> Schedule:
    _take(options, f'{where} (piecewise schedule)', ('points',))
    by, time = _times(options, where)
    given = options['points']
    if not isinstance(given, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in given):
        raise DistillError(f'{where}.points must be a list of [time, value], got {given!r}.')
    points = tuple((time(t, 'points'), number(v, f'{where}.points')) for t, v in given)
    if not points or any(a > b for (a, _), (b, _) in pairwise(points)):
        raise DistillError(f'{where}.points must be in the order of their times, at least one, got {given!r}.')
    return Piecewise(points, by)


@register_schedule('warmup')
def _warmup(options: dict[str, Any], where: str, number: Number) -> Schedule:
    _take(options, f'{where} (warmup schedule)', ('value', 'until'))
    by, time = _times(options, where)
    until = time(options['until'], 'until')
    if until <= 0:
        raise DistillError(f'{where}.until must be above 0, got {until:g}.')
    number(0.0, f'{where} begins at 0 and')
    return WarmUp(_read(options['value'], f'{where}.value', number, _PARSERS), until, by)


def is_zero(schedule: Schedule) -> bool:
    """Whether a value is 0 throughout the run."""
    return isinstance(schedule, Constant) and schedule.value == 0


def ended(schedule: Schedule, position: Position) -> bool:
    """Whether a value is 0 from a position to the end of the run; one that does not tell is not.

    Args:
        schedule: May have a method ``ended(position) -> bool``.
        position: Of the next iteration.
    """
    tell = getattr(schedule, 'ended', None)
    return is_zero(schedule) if tell is None else bool(tell(position))
