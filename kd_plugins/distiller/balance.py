"""How large the KD losses are beside the student's own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

#: KD over task loss outside of which a whole epoch is reported.
LOW, HIGH = 0.01, 10.0
#: And what the advice is to aim at.
AIM = 0.5
#: Iterations after which a run without epochs is judged, again and again.
PERIOD = 500
#: Iterations at the start and at the end of a run over which `Balance.share` is.
ENDS = 50


class Balance:
    """Sums KD and task losses on their device, so that nothing waits for it, until somebody asks."""

    def __init__(self) -> None:
        self._task: Tensor | None = None
        self._kd: Tensor | None = None
        self._reported: set[str] = set()
        self._first: list[tuple[Tensor, Tensor]] = []
        self._last: deque[tuple[Tensor, Tensor]] = deque(maxlen=ENDS)
        self._count = 0

    def add(self, task: Tensor, kd: Tensor) -> None:
        """One iteration: the student's own loss and the KD loss, detached and in the same scale."""
        self._task = task if self._task is None else self._task + task
        self._kd = kd if self._kd is None else self._kd + kd
        if len(self._first) < ENDS:
            self._first.append((task, kd))
        self._last.append((task, kd))
        self._count += 1

    def share(self) -> tuple[float | None, float | None]:
        """KD over task loss in the first and in the last iterations of the run in which KD was on.

        Each over at most `ENDS` iterations, and at most half of them all. None: there were none, or no task loss.
        """
        number = max(1, min(ENDS, self._count // 2))
        return _over(self._first[:number]), _over(list(self._last)[-number:])

    def ratio(self) -> float | None:
        """KD over task loss since the last call; None when KD was off, there is no task loss, or it is not finite."""
        task, kd, self._task, self._kd = self._task, self._kd, None, None
        if task is None or kd is None or float(task) == 0:
            return None
        ratio = float(kd) / max(float(task), torch.finfo(torch.float32).tiny)
        return ratio if math.isfinite(ratio) else None

    def verdict(self, low: bool = True) -> tuple[str, float] | None:
        """When KD was out of proportion since the last call, once per direction.

        Args:
            low: Whether it may be said to be too small.

        Returns:
            A sentence, and the factor for all weights that would make it `AIM`; None: it was in proportion.
        """
        ratio = self.ratio()
        if ratio is None or LOW <= ratio <= HIGH:
            return None
        kind = 'high' if ratio > HIGH else 'low'
        if kind in self._reported or (kind == 'low' and not low):
            return None
        self._reported.add(kind)
        factor = AIM / ratio if ratio > 0 else math.inf
        if kind == 'high':
            return f'KD was {ratio:.3g} times the task loss: the labels hardly count', factor
        return f'KD was {ratio:.2%} of the task loss: it hardly changes the student', factor


def _over(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    pairs = list(pairs)
    task, kd = (float(sum(float(pair[i]) for pair in pairs)) for i in (0, 1))
    ratio = kd / task if task else math.nan
    return ratio if math.isfinite(ratio) else None
