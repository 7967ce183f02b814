"""What a training logged: its curves and its speed, whichever framework wrote them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class History:
    """What a training run logged.

    Attributes:
        train: Logged iterations by global iteration: ``loss``, ``time`` in seconds, ``epoch``, ...
        val: Metrics by epoch (iteration in an iteration loop).
    """

    train: dict[int, dict[str, float]] = field(default_factory=dict)
    val: dict[int, dict[str, float]] = field(default_factory=dict)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """``(epochs, values)`` of a training scalar; fractions of epochs where the log has several lines each."""
        lines = [(step, line) for step, line in sorted(self.train.items()) if key in line]
        length = self._epoch_length()
        return [step / length for step, _ in lines], [line[key] for _, line in lines]

    def metric_curve(self, key: str) -> tuple[list[float], list[float]]:
        """``(epochs, values)`` of a validation metric."""
        lines = [(step, line) for step, line in sorted(self.val.items()) if key in line]
        # A loop over iterations validates at iterations; both curves are drawn over the same axis.
        return [float(step) for step, _ in lines], [line[key] for _, line in lines]

    def seconds_per_iteration(self) -> float:
        """Median of the logged ``time``, data loading included; NaN when nothing was logged."""
        times = [line['time'] for _, line in sorted(self.train.items()) if 'time' in line]
        # The first line contains the start of the loader's processes.
        return statistics.median(times[1:] or times) if times else float('nan')

    def _epoch_length(self) -> float:
        # Iteration loops have no epochs, or one that never ends.
        ends: dict[float, int] = {}
        for step, line in self.train.items():
            if 'epoch' in line:
                ends[line['epoch']] = max(step, ends.get(line['epoch'], 0))
        if len(ends) < 2:
            return 1.0
        (first, a), *_, (last, b) = sorted(ends.items())
        return (b - a) / (last - first)
