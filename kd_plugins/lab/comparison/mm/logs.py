"""Reading what an MMEngine run leaves behind: curves, speed, progress, metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_plugins.lab.comparison.history import History
from kd_plugins.lab.comparison.phases import Progress

_EPOCH = re.compile(r'Epoch\((train|val|test)\)\s*(?:\[\s*(\d+)\])?\[\s*(\d+)/(\d+)\]')
_ITER = re.compile(r'Iter\((train|val|test)\)\s*\[\s*(\d+)/(\d+)\]')
_LOSS = re.compile(r'\bloss: ([-\d.eE+]+|nan|inf)')


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


class RunnerProgress(Progress):
    """Where a Runner is, from its text log.

    Args:
        name: What the accuracy is called.
        logged: The end of its key in the log.
        whole: What is logged for a perfect result.
    """

    def __init__(self, name: str = 'mAP', logged: str = 'bbox_mAP', whole: float = 1.0) -> None:
        super().__init__(metric_name=name)
        self._accuracy = re.compile(rf'{re.escape(logged)}: ([-\d.]+)')
        self._whole = whole

    def update(self, line: str, mode: str, max_epochs: int | None) -> bool:
        """See `Progress.update`."""
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
        loss, metric = _LOSS.search(line), self._accuracy.search(line)
        self.loss = float(loss[1]) if loss else self.loss
        self.metric = float(metric[1]) / self._whole if metric else self.metric
        return True


def find_metric(metrics: Mapping[str, Any], suffix: str) -> float:
    """A metric by the end of its name, e.g. ``'bbox_mAP'`` for ``'coco/bbox_mAP'``; NaN when it is missing."""
    return next((float(v) for k, v in metrics.items() if k.endswith(suffix)), float('nan'))
