"""How a weight or temperature changes over a run, and in which part of it a term is on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kd_plugins.errors import DistillError, check_keys, in_words, nearest


class Schedule(Protocol):
    """A value over the run. ``str()`` of it says it in the summary."""

    def __call__(self, progress: float) -> float:
        """The value when this fraction of the run, in [0, 1], is done."""
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

    def __call__(self, progress: float) -> float:
        return self.value

    def __str__(self) -> str:
        return f'{self.value:g}'


@dataclass(frozen=True)
class Ramp:
    """From ``start`` to ``end`` between two fractions of the run, constant outside.

    Args:
        start: Value at and before ``begin``.
        end: Value at and after ``until``.
        begin: Fraction of the run at which the change begins, in [0, 1].
        until: Fraction of the run at which the change is complete, in [0, 1].
        shape: ``'linear'`` or ``'cosine'``.
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0
    shape: str = 'linear'

    def __call__(self, progress: float) -> float:
        x = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        if self.shape == 'cosine':
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start + (self.end - self.start) * x

    def __str__(self) -> str:
        return f'{self.start:g} -> {self.end:g} ({self.shape}, {self.begin:g} to {self.until:g} of the run)'


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


def build_schedule(value: Any, where: str, low: float = 0.0, strict: bool = False) -> Schedule:
    """Read a schedule from its spelling in a config.

    Args:
        value: A number, or ``dict(type='linear' | 'cosine', start=, end=, begin=0.0, until=1.0)`` with ``begin`` and
            ``until`` as fractions of the run, or another ``type`` that `register_schedule` made known.
        where: What it is, for error messages, e.g. ``"term 'logits': weight"``.
        low: Smallest allowed value.
        strict: Whether ``low`` itself is excluded.

    Raises:
        DistillError: The spelling is wrong or a value is out of range.
    """

    def number(found: Any, place: str) -> float:
        return check_number(found, place, low, strict)

    if not isinstance(value, Mapping):
        return Constant(number(value, where))
    options = dict(value)
    kind = options.pop('type', None)
    if kind not in _PARSERS:
        raise DistillError(f'{where} has no schedule type {kind!r}: {nearest(kind, _PARSERS)}')
    try:
        return _PARSERS[kind](options, where, number)
    except DistillError:
        raise
    except Exception as error:
        raise DistillError(f'{where} ({kind} schedule) does not take these options: {in_words(error)}.') from error


def _ramp(shape: str) -> Parser:
    def parse(options: dict[str, Any], where: str, number: Number) -> Ramp:
        check_keys(options, ('start', 'end', 'begin', 'until'), f'{where} ({shape} schedule)')
        for key in ('start', 'end'):
            if key not in options:
                raise DistillError(f"{where}: a schedule needs 'start' and 'end', {key!r} is missing.")
            options[key] = number(options[key], f'{where}.{key}')
        for key, default in (('begin', 0.0), ('until', 1.0)):
            options[key] = check_number(options.get(key, default), f'{where}.{key}')
        if not options['begin'] < options['until'] <= 1:
            raise DistillError(
                f'{where}: begin and until are fractions of the run with begin < until <= 1, '
                f'got {options["begin"]:g} and {options["until"]:g}.'
            )
        return Ramp(**options, shape=shape)

    return parse


for _shape in ('linear', 'cosine'):
    register_schedule(_shape)(_ramp(_shape))


def is_zero(schedule: Schedule) -> bool:
    """Whether a value is 0 throughout the run."""
    return isinstance(schedule, Constant) and schedule.value == 0
