"""A weight that is found in the run: it holds a term at a share of the student's own loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_plugins.distiller.ranks import sum_over_ranks
from kd_plugins.distiller.schedules import Constant, Schedule, build_schedule, check_number
from kd_plugins.distiller.temperature import KINDS
from kd_plugins.errors import DistillError, check_keys

AUTO = 'auto'
KEYS = ('type', 'target', 'batches', 'track', 'most', 'schedule')
#: Batches from which a weight is found.
BATCHES = 50
#: Largest weight: of equal models the loss is next to nothing, and a share of it would be all noise.
MOST = 1000.0


class Ratio:
    r"""A weight :math:`w` with :math:`w\,\bar L_\mathrm{KD} = r\,\bar L_\mathrm{task}`, of means over some batches.

    The means are over all ranks and, from the first batch on, over those seen so far, so that the very first weight is
    that of the first batch. After ``batches`` of them the weight is fixed; with ``track`` the means go on, as
    exponential ones. Batches whose losses are not finite do not count. All of it stays on the device.

    Args:
        target: :math:`r`, above 0.
        batches: How many of them, at least 1.
        track: Whether the weight follows the losses through the whole run.
        most: Largest weight.
    """

    def __init__(self, target: float, batches: int = BATCHES, track: bool = False, most: float = MOST) -> None:
        self.target, self.batches, self.track, self.most = target, batches, track, most
        self._sums: Tensor | None = None
        self._asked = 0

    def __str__(self) -> str:
        how = 'tracked' if self.track else f'of {self.batches} batches'
        return f'auto: {self.target:g} of the task loss, {how}'

    @torch.no_grad()
    def weight(self, task: Tensor, value: Tensor) -> Tensor:
        """The weight in this iteration.

        Args:
            task: The student's own loss as it counts, a scalar.
            value: The term's loss, in the same scale.
        """
        if self.track or self._asked < self.batches:
            self._add(torch.stack([task.detach().float(), value.detach().float()]))
        return self._current()

    def _add(self, found: Tensor) -> None:
        found = sum_over_ranks(found)
        found = torch.where(torch.isfinite(found).all(), found, torch.zeros_like(found))
        sums = torch.zeros_like(found) if self._sums is None else self._sums.to(found.device)
        # The first ones count alike: an exponential mean would begin with the first batch alone.
        decay = 1 - 1 / self.batches if self._asked >= self.batches else 1.0
        self._sums, self._asked = sums * decay + found, self._asked + 1

    def _current(self) -> Tensor:
        assert self._sums is not None
        task, value = self._sums
        tiny = torch.finfo(torch.float32).tiny
        return (self.target * task / value.clamp(min=tiny)).clamp(0.0, self.most)

    @property
    def current(self) -> float:
        """The weight of the last iteration, for logs; 0 before the first."""
        return 0.0 if self._sums is None else float(self._current())

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return dict(sums=None if self._sums is None else self._sums.cpu().clone(), asked=self._asked)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._sums, self._asked = state['sums'], int(state['asked'])


def build_weight(value: Any, where: str) -> tuple[Schedule, Ratio | None]:
    """Read a term's ``weight``: a number, a schedule, or ``'auto:0.5'``.

    Args:
        value: Also ``dict(type='auto', target=0.5, batches=50, track=False, most=1000, schedule=1.0)``, of which
            ``schedule`` is what the weight is multiplied by.
        where: What it is, for error messages.

    Returns:
        The schedule, and what is multiplied by it.

    Raises:
        DistillError: It is misspelt or out of range.
    """
    if isinstance(value, str) and value.partition(':')[0].strip() == AUTO:
        text = value.partition(':')[2]
        try:
            value = dict(type=AUTO, target=float(text))
        except ValueError:
            raise DistillError(
                f"{where} must say at what share of the student's own loss the term is held, 'auto:0.5', got {value!r}."
            ) from None
    if not isinstance(value, Mapping) or value.get('type') != AUTO:
        if isinstance(value, Mapping) and value.get('type') in KINDS:
            raise DistillError(f"{where}: type={value['type']!r} is for temperatures; write a number or 'auto:0.5'.")
        return build_schedule(value, where), None
    check_keys(value, KEYS, f'{where} (auto)')
    if 'target' not in value:
        raise DistillError(f"{where} (auto) needs 'target', the share of the student's own loss, e.g. 0.5.")
    batches, track = value.get('batches', BATCHES), value.get('track', False)
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise DistillError(f'{where}.batches must be a whole number of at least 1, got {batches!r}.')
    if not isinstance(track, bool):
        raise DistillError(f'{where}.track must be True or False, got {track!r}.')
    target, most = (
        check_number(value.get(key, MOST), f'{where}.{key}', 0.0, strict=True) for key in ('target', 'most')
    )
    schedule = build_schedule(value.get('schedule', 1.0), f'{where}.schedule')
    if isinstance(schedule, Constant) and schedule.value != 1:
        raise DistillError(f'{where}.schedule is a schedule; a number belongs into target, got {schedule}.')
    return schedule, Ratio(target, batches, track, most)
