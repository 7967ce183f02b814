"""How large the KD losses are beside the student's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: KD over task loss outside of which a whole epoch is reported.
LOW, HIGH = 0.01, 10.0


class Balance:
    """Sums KD and task losses on their device, so that nothing waits for it, until somebody asks."""

    def __init__(self) -> None:
        self._task: Tensor | None = None
        self._kd: Tensor | None = None
        self._reported: set[str] = set()

    def add(self, task: Tensor, kd: Tensor) -> None:
        """One iteration: the student's own loss and the KD loss, detached and in the same scale."""
        self._task = task if self._task is None else self._task + task
        self._kd = kd if self._kd is None else self._kd + kd

    def ratio(self) -> float | None:
        """KD over task loss since the last call; None when KD was off, there is no task loss, or it is not finite."""
        task, kd, self._task, self._kd = self._task, self._kd, None, None
        if task is None or kd is None or float(task) == 0:
            return None
        ratio = float(kd) / max(float(task), torch.finfo(torch.float32).tiny)
        return ratio if math.isfinite(ratio) else None

    def verdict(self) -> str | None:
        """A sentence when KD was out of proportion since the last call; once per direction."""
        ratio = self.ratio()
        if ratio is None or LOW <= ratio <= HIGH:
            return None
        kind = 'high' if ratio > HIGH else 'low'
        if kind in self._reported:
            return None
        self._reported.add(kind)
        if kind == 'high':
            return f'KD was {ratio:.3g} times the task loss: the labels hardly count; lower the weights'
        return f'KD was {ratio:.2%} of the task loss: it hardly changes the student; raise the weights'
