"""How a weight or temperature changes over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd_plugins.errors import DistillError, check_keys, nearest


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


Schedule = Constant | Ramp
_SHAPES = ('linear', 'cosine')


def _number(value: Any, where: str, low: float, strict: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DistillError(f'{where} must be a number or a schedule, got {value!r}.')
    if not math.isfinite(value) or value < low or (strict and value <= low):
        raise DistillError(f'{where} must be a finite number {">" if strict else ">="} {low:g}, got {value!r}.')
    return float(value)


def build_schedule(value: Any, where: str, low: float = 0.0, strict: bool = False) -> Schedule:
    """Read a schedule from its spelling in a config.

    Args:
        value: A number, or ``dict(type='linear' | 'cosine', start=, end=, begin=0.0, until=1.0)`` with ``begin`` and
            ``until`` as fractions of the run.
        where: What it is, for error messages, e.g. ``"term 'logits': weight"``.
        low: Smallest allowed value.
        strict: Whether ``low`` itself is excluded.

    Raises:
        DistillError: The spelling is wrong or a value is out of range.
    """
    if not isinstance(value, Mapping):
        return Constant(_number(value, where, low, strict))
    given = dict(value)
    kind = given.pop('type', None)
    if kind not in _SHAPES:
        raise DistillError(f'{where} has no schedule type {kind!r}: {nearest(kind, _SHAPES)}')
    check_keys(given, ('start', 'end', 'begin', 'until'), f'{where} ({kind} schedule)')
    for key in ('start', 'end'):
        if key not in given:
            raise DistillError(f"{where}: a schedule needs 'start' and 'end', {key!r} is missing.")
        given[key] = _number(given[key], f'{where}.{key}', low, strict)
    for key, default in (('begin', 0.0), ('until', 1.0)):
        given[key] = _number(given.get(key, default), f'{where}.{key}', 0.0, False)
    if not given['begin'] < given['until'] <= 1:
        raise DistillError(
            f'{where}: begin and until are fractions of the run with begin < until <= 1, '
            f'got {given["begin"]:g} and {given["until"]:g}.'
        )
    return Ramp(**given, shape=kind)
