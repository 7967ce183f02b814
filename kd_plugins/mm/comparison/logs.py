"""Reading what an MMEngine run leaves behind: curves, speed, progress, metrics."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_EPOCH = re.compile(r'Epoch\((train|val|test)\)\s*(?:\[\s*(\d+)\])?\[\s*(\d+)/(\d+)\]')
_ITER = re.compile(r'Iter\((train|val|test)\)\s*\[\s*(\d+)/(\d+)\]')
_LOSS = re.compile(r'\bloss: ([-\d.eE+]+|nan|inf)')
_MAP = re.compile(r'bbox_mAP: ([-\d.]+)')


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


def read_history(work_dir: Path) -> History:
    """Merge the logs of a run and of its resumptions; where two overlap the later one counts.

    Args:
        work_dir: Its ``work_dir``.
    """
    history = History()
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # the process was killed while it wrote
                continue
            step = line.get('step')
            if step is None:
                continue
            if 'loss' in line:
                history.train[step] = line
            else:
                history.val[step] = line
    return history


def read_test_metrics(work_dir: Path) -> dict[str, float]:
    """The metrics that the last ``tools/test.py`` wrote; empty when there are none."""
    for path in sorted(work_dir.glob('*/*.json'), reverse=True):
        try:
            metrics = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(metrics, Mapping):
            return {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
    return {}


@dataclass
class Progress:
    """Where a run is, from its text log.

    Attributes:
        done: Fraction done in [0, 1].
        epoch: Current epoch, or None.
        loss: Last logged loss, or None.
        metric: Last logged box mAP, or None.
    """

    done: float = 0.0
    epoch: int | None = None
    loss: float | None = None
    metric: float | None = None

    def update(self, line: str, mode: str, max_epochs: int | None) -> bool:
        """Read one line of the log.

        Args:
            line: The line.
            mode: ``'train'`` or ``'test'``: what the fraction is of.
            max_epochs: Length of the run in epochs; None for a loop over iterations.

        Returns:
            Whether it said something new.
        """
        found = _EPOCH.search(line)
        if found:
            kind, epoch, step, steps = found.groups()
            if kind == mode == 'train' and epoch and max_epochs:
                self.epoch = int(epoch)
                self.done = (int(epoch) - 1 + int(step) / int(steps)) / max_epochs
            elif kind == mode == 'test':
                self.done = int(step) / int(steps)
        else:
            found = _ITER.search(line)
            if not found:
                return False
            if found[1] == mode:
                self.done = int(found[2]) / int(found[3])
        loss, metric = _LOSS.search(line), _MAP.search(line)
        self.loss = float(loss[1]) if loss else self.loss
        self.metric = float(metric[1]) if metric else self.metric
        return True


def tail(path: Path, lines: int = 25) -> str:
    """The end of a log."""
    return '\n'.join(path.read_text(errors='replace').splitlines()[-lines:]) if path.is_file() else ''


def find_metric(metrics: Mapping[str, Any], suffix: str) -> float:
    """A metric by the end of its name, e.g. ``'bbox_mAP'`` for ``'coco/bbox_mAP'``; NaN when it is missing."""
    return next((float(v) for k, v in metrics.items() if k.endswith(suffix)), float('nan'))
