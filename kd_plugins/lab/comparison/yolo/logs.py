"""Reading what an Ultralytics run leaves behind: curves, speed and progress."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from kd_plugins.lab.comparison.history import History
from kd_plugins.lab.comparison.phases import Progress

#: Columns that hold distillation losses: ours, and that of ``distill_model=``.
DISTILLATION = re.compile(r'train/(kd\w+|dis)_loss')
_ANSI = re.compile(r'\x1b\[[0-9;]*[A-Za-z]')
_EPOCH = re.compile(r'^\s*(\d+)/(\d+)\s+[\d.]+G?\s.*?(\d+)%')


def read_history(folder: Path, metric: str) -> History:
    """Read ``results.csv``: one line per epoch.

    ``loss`` is the sum of the student's own losses, ``loss_kd`` that of the distillation, ``time`` the seconds of the
    epoch with its validation.

    Args:
        folder: The run's folder.
        metric: The column of the validation that is read.
    """
    history, before = History(), 0.0
    path = folder / 'results.csv'
    if not path.is_file():
        return history
    with path.open(newline='') as file:
        for row in csv.DictReader(file, skipinitialspace=True):
            values = {k.strip(): float(v) for k, v in row.items() if k and v and v.strip()}
            epoch = int(values['epoch'])
            losses = {k: v for k, v in values.items() if k.startswith('train/') and k.endswith('loss')}
            kd = sum(v for k, v in losses.items() if DISTILLATION.fullmatch(k))
            line = dict(epoch=epoch, loss=sum(losses.values()) - kd, loss_kd=kd)
            clock = values.get('time', 0.0)
            # It begins at 0 again when a run is resumed.
            if clock > before:
                line['time'] = clock - before
            before = clock
            history.train[epoch] = line
            # Of an epoch that was not validated Ultralytics writes zeros.
            losses = [v for k, v in values.items() if k.startswith('val/')]
            if metric in values and (any(losses) or not losses):
                history.val[epoch] = {metric: values[metric]}
    return history


class TrainerProgress(Progress):
    """Where a training is, from its progress bar.

    Args:
        name: What the accuracy is called.
        column: Numbers that stand before it in the line of all classes.
    """

    def __init__(self, name: str = 'mAP', column: int = 5) -> None:
        super().__init__(metric_name=name)
        self._all = re.compile(rf'^\s*all\s+(?:[\d.e+-]+\s+){{{column}}}([\d.e+-]+)')

    def update(self, line: str, mode: str, max_epochs: int | None) -> bool:
        """See `Progress.update`."""
        line = _ANSI.sub('', line)
        found = _EPOCH.match(line)
        if found:
            epoch, epochs, percent = map(int, found.groups())
            self.epoch, self.done = epoch, (epoch - 1 + percent / 100) / epochs
            return True
        found = self._all.match(line)
        if found:
            self.metric = float(found[1])
        return bool(found)
