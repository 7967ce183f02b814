"""A user's file: a schedule."""

from dataclasses import dataclass
from typing import Any

from kd_plugins.distiller import Position, Schedule, register_schedule


@dataclass(frozen=True)
class Halving:
    """Half as much, so many times over the run."""

    start: float
    times: float

    def __call__(self, position: Position) -> float:
        return self.start * 0.5 ** (self.times * position.progress)

    def __str__(self) -> str:
        return f'{self.start:g}, halved {self.times:g} times'


@register_schedule('halving')
def halving(options: dict[str, Any], where: str, number: Any) -> Schedule:
    """``dict(type='halving', start=2.0, times=3)``; ``number`` checks a value against the limits of the option."""
    return Halving(**{key: number(value, f'{where}.{key}') for key, value in options.items()})
