"""Temperatures that are found in the run: from the losses of student and teacher, or learned against the student."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kd_plugins.distiller.optimizer import NO_DECAY
from kd_plugins.distiller.ranks import sum_over_ranks
from kd_plugins.distiller.schedules import (
    Number,
    Parser,
    Position,
    Ramp,
    Schedule,
    build_schedule,
    check_number,
)
from kd_plugins.errors import DistillError, check_keys
from kd_plugins.predictions import Form

#: Iterations after which a run without epochs changes a temperature.
EVERY = 100


class Observing:
    """A temperature that depends on what happens in the run."""

    def __call__(self, position: Position) -> float:
        """The value in the iteration at this position."""
        raise NotImplementedError

    def begin(self, position: Position) -> None:
        """An iteration begins."""
        raise NotImplementedError

    def check(self, student: Form) -> None:
        """Before the run: refuse predictions of which nothing can be said."""
        raise NotImplementedError

    def observe(self, student: Form, teacher: Form, target: Tensor | None, known: Tensor | None) -> None:
        """What was predicted in this iteration, aligned.

        Args:
            student: Of the student.
            teacher: Of the teacher.
            target: Labels in the classes that are compared.
            known: ``(B,)`` bool mask of the images that count; None: all.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        raise NotImplementedError

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        raise NotImplementedError


class GapTemperature(Observing):
    r"""Rises while the teacher is clearly better than the student, falls where the student has caught up.

    After every epoch (every `EVERY` iterations in a run without epochs) the gap
    :math:`\mathrm{CE}(z^s, y) - \mathrm{CE}(z^t, y)` over all of its images and ranks changes it: above ``tolerance``
    by ``step``, below ``-tolerance`` by ``-step``, within ``low`` and ``high``.

    Args:
        start: First value.
        low: Smallest value.
        high: Largest value.
        step: By how much it changes at a time.
        tolerance: Gap that changes nothing.
    """

    def __init__(
        self, start: float = 1.0, low: float = 1.0, high: float = 5.0, step: float = 0.1, tolerance: float = 0.1
    ) -> None:
        self.value, self.low, self.high, self.step, self.tolerance = start, low, high, step, tolerance
        self._text = f'{start:g}, by the gap to the teacher ({low:g} to {high:g})'
        self._sums: Tensor | None = None
        self._unit: int | None = None

    def __str__(self) -> str:
        return self._text

    def __call__(self, position: Position) -> float:
        return self.value

    def begin(self, position: Position) -> None:
        """See `Observing`; where an epoch has ended, the one moment in which the host waits."""
        unit = int(position.iteration // EVERY) if position.epoch is None else math.floor(position.epoch)
        if self._unit is not None and unit != self._unit and self._sums is not None:
            (gap, images), self._sums = self._sums.tolist(), None
            gap = gap / images if images else 0.0
            change = self.step if gap > self.tolerance else -self.step if gap < -self.tolerance else 0.0
            # Tenths add up to tenths.
            self.value = round(min(max(self.value + change, self.low), self.high), 9)
        self._unit = unit

    def check(self, student: Form) -> None:
        """See `Observing`."""
        if student.source.dim() != 2 or getattr(student, 'activation', 'softmax') == 'sigmoid':
            raise DistillError(
                "temperature type='gap' compares losses on the labels of whole images; take it for classifiers whose "
                'classes exclude each other.'
            )

    @torch.no_grad()
    def observe(self, student: Form, teacher: Form, target: Tensor | None, known: Tensor | None) -> None:
        """See `Observing`."""
        if target is None:
            raise DistillError("temperature type='gap' compares losses on labels, and this batch has none.")
        ours, theirs = (cross_entropy(p.source.float(), target, reduction='none') for p in (student, teacher))
        counts = torch.ones_like(ours) if known is None else known.to(ours.dtype)
        # In every iteration, so that what is saved is the same on all ranks.
        found = sum_over_ranks(torch.stack([((ours - theirs) * counts).sum(), counts.sum()]))
        self._sums = found if self._sums is None else self._sums.to(found.device) + found

    def state(self) -> dict[str, Any]:
        """See `Observing`."""
        return dict(value=self.value, sums=None if self._sums is None else self._sums.cpu().clone(), unit=self._unit)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Observing`."""
        self.value, self._sums, self._unit = float(state['value']), state['sums'], state['unit']


class LearnedTemperature(nn.Module):
    r"""Curriculum temperature: learned to make the student's task harder and harder (CTKD).

    .. math:: T = l + s\,\sigma(\theta), \qquad \nabla_\theta \leftarrow -\lambda \nabla_\theta

    :math:`\theta` is trained with the adapters, without weight decay, on the term's own loss with its gradient reversed
    and multiplied by :math:`\lambda`, which rises from 0 to 1 along a cosine. Li et al., "Curriculum Temperature for
    Knowledge Distillation" (AAAI 2023, arXiv 2211.16231): the global version, one temperature for all images.

    Args:
        low: :math:`l`.
        span: :math:`s`.
        theta: First value of :math:`\theta`; with the paper's 1.0 the temperature begins at 15.6.
        strength: Schedule of :math:`\lambda`.
    """

    def __init__(self, strength: Schedule, low: float = 1.0, span: float = 20.0, theta: float = 1.0) -> None:
        super().__init__()
        self.strength, self.low, self.span = strength, low, span
        self.theta = nn.Parameter(torch.tensor(float(theta)))
        setattr(self.theta, NO_DECAY, True)

    def __str__(self) -> str:
        return f'learned, {float(self.value()):.3g} at first ({self.low:g} to {self.low + self.span:g})'

    def value(self) -> Tensor:
        """The temperature as it is, with a gradient to :math:`\theta`."""
        return self.low + self.span * self.theta.sigmoid()

    def forward(self, position: Position) -> Tensor:
        """The temperature in an iteration, its gradient reversed."""
        value = self.value()
        # The value is the same: only what flows back is scaled.
        return value.detach() - (value - value.detach()) * self.strength(position)


def _gap(options: dict[str, Any], where: str, number: Number) -> Schedule:
    check_keys(options, ('start', 'low', 'high', 'step', 'tolerance'), f'{where} (gap)')
    limited = [key for key in ('start', 'low', 'high') if key in options]
    found = {str(key): number(options[key], f'{where}.{key}') for key in limited}
    found.update({key: check_number(options[key], f'{where}.{key}') for key in ('step', 'tolerance') if key in options})
    made = GapTemperature(**found)
    if not made.low <= made.value <= made.high:
        raise DistillError(
            f'{where}: low <= start <= high is needed, got {made.low:g}, {made.value:g} and {made.high:g}.'
        )
    return made


def _learned(options: dict[str, Any], where: str, number: Number) -> Schedule:
    check_keys(options, ('low', 'span', 'theta', 'strength'), f'{where} (learned)')
    limited = [key for key in ('low', 'span') if key in options]
    found = {str(key): number(options[key], f'{where}.{key}') for key in limited}
    if 'theta' in options:
        found['theta'] = check_number(options['theta'], f'{where}.theta', -math.inf)
    given = options.get('strength')
    # Ten of the paper's 240 epochs.
    strength: Schedule = Ramp(0.0, 1.0, until=0.05, shape='cosine')
    if given is not None:
        strength = build_schedule(given, f'{where}.strength')
    return LearnedTemperature(strength, **found)


#: What only temperatures can be, by ``type``: nothing that is multiplied or nested is asked or trained.
KINDS: dict[str, Parser] = {'gap': _gap, 'learned': _learned}


def build_temperature(value: Any, where: str) -> Schedule:
    """Read a term's ``temperature``: a number or a schedule of values above 0, ``gap`` or ``learned``.

    Args:
        value: See `kd_plugins.distiller.schedules.build_schedule`, `GapTemperature` and `LearnedTemperature`.
        where: What it is, for error messages.

    Raises:
        DistillError: It is misspelt or out of range.
    """
    return build_schedule(value, where, 0.0, strict=True, more=KINDS)
