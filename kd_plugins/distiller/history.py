"""What a distilled run logged, as rows that a table or a plot is made of: the same in every zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class History:
    """Collects one row for every epoch (every logged interval of a run that is counted in iterations).

    What is added stays on its device until a row is closed, so that no iteration waits for it.

    Attributes:
        rows: Plain dicts for ``pandas.DataFrame(rows)``: ``epoch`` (or ``iteration``) counted from 1; of every term its
            mean value ``loss_kd_<term>`` as it was logged, and its ``weight_<term>`` in the end, both 0 while it is
            off, and its ``temperature_<term>``, where that has a schedule; ``kd_ratio``, all of KD over the task loss,
            None where there was none; and ``metric``, the compared one's value where there was a validation, else None.
        metric: Name of what was compared; None: there was no validation.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.metric: str | None = None
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, losses: Mapping[str, Tensor], task: Tensor, kd: Tensor) -> None:
        """One iteration in which KD was on.

        Args:
            losses: ``loss_kd_<term>`` of every term, always in the same order.
            task: The student's own loss, as it counts.
            kd: All KD losses, in its scale.
        """
        values = torch.stack([v.detach().float() for v in (*losses.values(), task, kd)])
        self._sum = values if self._sum is None else self._sum + values
        self._count += 1

    def close(
        self, unit: str, at: int, weights: Mapping[str, float], temperatures: Mapping[str, float] | None = None
    ) -> None:
        """An epoch (an interval) is over; one that was done again takes the place of the first try.

        Args:
            unit: What ``at`` counts: ``'epoch'`` or ``'iteration'``.
            at: Which one, counted from 1.
            weights: Of every term in the order of its losses, 0 while it is off.
            temperatures: Of the terms that have a schedule of it.
        """
        total, count = self._sum, max(self._count, 1)
        self._sum, self._count = None, 0
        *means, task, kd = [0.0] * (len(weights) + 2) if total is None else (total / count).tolist()
        row: dict[str, Any] = {unit: at}
        row.update({f'loss_kd_{name}': value for name, value in zip(weights, means, strict=True)})
        row.update({f'weight_{name}': value for name, value in weights.items()})
        row.update({f'temperature_{name}': value for name, value in (temperatures or {}).items()})
        row.update(kd_ratio=kd / task if task else None if total is not None else 0.0, metric=None)
        self.rows[:] = [r for r in self.rows if r[unit] < at] + [row]

    def at(self, unit: str) -> int:
        """The last epoch (iteration) that has a row, 0 where there is none."""
        return self.rows[-1][unit] if self.rows else 0

    def measured(self, name: str, value: float) -> None:
        """A validation behind the last row.

        Args:
            name: What is compared.
            value: Its value.
        """
        if self.rows:
            self.rows[-1]['metric'], self.metric = value, name
