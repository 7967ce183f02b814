"""Trying recipes on a pair of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from kd_plugins.distiller import Host, Session, Teacher, images_of, untouched_rng
from kd_plugins.distiller.ratio import Ratio
from kd_plugins.distiller.schedules import Constant, Schedule
from kd_plugins.distiller.terms import Lookup
from kd_plugins.errors import DistillError
from kd_plugins.recipes import names, tasks_of
from kd_plugins.teachers.run import RunOptions, match_teachers, open_session

#: A weight is worth trying from this fraction of the recipe's up to as many times it.
SPREAD = 3.0


@dataclass(frozen=True)
class Pair:
    """A student and a teacher.

    Attributes:
        student: The plain student.
        teacher: The loaded teacher.
        host: The framework.
        task: What the student does, as recipes name it.
        batch: ``batch(images)`` makes ``(inputs, samples)`` of that many pictures.
        classes: Names of the student's classes, None where they are not known before the data is.
        count: Classes that the student's head predicts.
        read: ``read(options)``: what options stand for in this framework.
        more: Finds losses that are in no module of ``imports``.
        refuse: Refuses what only this framework refuses of a session.
        notes: What a reader must know about the trial.
    """

    student: nn.Module
    teacher: Teacher
    host: Host
    task: str
    batch: Callable[[int], tuple[Tensor, Any]]
    classes: Sequence[str] | None
    count: int | None
    read: Callable[[str], RunOptions]
    more: Lookup | None = None
    refuse: Callable[[Session], None] = lambda session: None
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Trial:
    """What came out for a recipe.

    Attributes:
        recipe: Its name.
        weights: The weights of its terms, with what is worth trying; ``''`` where it does not fit.
        reason: Why it does not fit; ``''`` where it does.
    """

    recipe: str
    weights: str = ''
    reason: str = ''

    @property
    def fits(self) -> bool:
        """Whether a run with it would start."""
        return not self.reason


def try_recipes(pair: Pair) -> list[Trial]:
    """Try every recipe that is for the task of the student; the models stay as they are.

    Args:
        pair: The models.

    Returns:
        Those that fit first.
    """
    found = [try_recipe(pair, name) for name in names(pair.task)]
    return sorted(found, key=lambda trial: not trial.fits)


def try_recipe(pair: Pair, name: str) -> Trial:
    """Try one recipe as a run would do it before its first iteration."""
    try:
        options = pair.read(name)
        session = open_session(pair.student, {'': pair.teacher}, options, pair.host, pair.more)
        pair.refuse(session)
        session.check_heads()
        match_teachers(session, pair.classes, options, pair.count)
        with untouched_rng():
            session.check(*pair.batch(images_of(session.terms.values())))
    except DistillError as error:
        return Trial(name, reason=' '.join(str(error).split()))
    return Trial(name, weights_text({n: t.ratio or t.weight for n, t in session.terms.items()}, options.alpha))


def weights_text(weights: Mapping[str, Schedule | Ratio], alpha: float | None = None) -> str:
    """Weights of terms with the range that is worth trying: ``neck 3 (1 to 9)``."""
    parts = [f'{name} {_weight(weight)}' for name, weight in weights.items()]
    return ', '.join([*parts, *([f'alpha {alpha:g}'] if alpha is not None else [])])


def _weight(weight: Schedule | Ratio) -> str:
    if not isinstance(weight, Constant):
        return str(weight)
    return f'{weight} ({weight.value / SPREAD:.2g} to {weight.value * SPREAD:.2g})'


def others(task: str) -> dict[str, list[str]]:
    """The recipes that are for other tasks only, by these."""
    found: dict[str, list[str]] = {}
    for name in names():
        if task not in tasks_of(name):
            found.setdefault(' and '.join(tasks_of(name)), []).append(name)
    return found
