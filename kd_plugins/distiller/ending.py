"""What a distilled run leaves: the block at its end, the same as JSON, and the files in which both stand."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_plugins.distiller.summary import entry

#: Beside the log of a run: the summary of the start with the block of the end, and the latter as data.
TEXT_FILE, JSON_FILE = 'kd_summary.txt', 'kd_summary.json'


@dataclass(frozen=True)
class Best:
    """The best validation of a run, or the last one where nothing tells better from worse.

    Attributes:
        metrics: What was measured; the first is the one that was compared.
        at: Epoch (iteration) of it, counted from 1.
    """

    metrics: Mapping[str, float]
    at: int | None = None

    @property
    def main(self) -> str:
        """Name of the metric that was compared."""
        return next(iter(self.metrics))


class Validations:
    """Keeps the best validation of a run.

    Args:
        greater: Whether more is better; None: that is not known, and the last one is kept.
    """

    def __init__(self, greater: bool | None = True) -> None:
        self.greater = greater
        self.best: Best | None = None

    def add(self, metrics: Mapping[str, Any], main: str, at: int) -> None:
        """One validation.

        Args:
            metrics: What was measured; values that are no numbers are left out.
            main: The metric that is compared.
            at: Epoch (iteration) of it, counted from 1.
        """
        numbers = numbers_of(metrics, main)
        value = numbers.get(main, math.nan)
        if math.isnan(value):
            return
        before = self.best.metrics[self.best.main] if self.best is not None else None
        if before is None or self.greater is None or (value > before if self.greater else value < before):
            self.best = Best(numbers, at)


def numbers_of(metrics: Mapping[str, Any], main: str | None = None) -> dict[str, float]:
    """The numbers among metrics as floats, the one called ``main`` first."""
    found: dict[str, float] = {}
    for key in [*([main] if main is not None and main in metrics else []), *metrics]:
        try:
            found[str(key)] = float(metrics[key])
        except (TypeError, ValueError):
            continue
    return found


@dataclass(frozen=True)
class Student:
    """The plain student that a run wrote.

    Attributes:
        path: Of the file.
        source: What its weights are, e.g. ``'best of 12 epochs'``.
        holds: What is in it.
        commands: Name to a command that works with it, e.g. ``'test'``.
        files: More files that belong to it, by name.
    """

    path: str
    source: str
    holds: str
    commands: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ending:
    """What came out of a distilled run.

    Attributes:
        name: The student's class or model.
        unit: What runs are counted in: ``'epoch'`` or ``'iteration'``.
        total: Epochs (iterations) that were trained in the end.
        seconds: Wall time of this process's training.
        share: ``kd_ratio`` in the first and in the last iterations with KD, see `Session.share`.
        asked: Iterations in which KD was on.
        teachers: Seconds that each teacher took per batch, by name.
        best: The best validation; None: there was none.
        teacher: The teacher's value of the compared metric, where it is known.
        teacher_on: Which images it was measured on, in words, where these were not all.
        student: The plain student; None: none was written.
        notes: More lines.
        folder: Where the log of the run is.
    """

    name: str
    unit: str
    total: int
    seconds: float
    share: tuple[float | None, float | None] = (None, None)
    best: Best | None = None
    teacher: float | None = None
    student: Student | None = None
    notes: tuple[str, ...] = ()
    folder: str = '.'
    teacher_on: str = ''
    asked: int = 0
    teachers: Mapping[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """The block as it is printed; but for commands, no line is longer than `kd_plugins.distiller.summary.WIDTH`."""
        lines = ['Knowledge distillation is DONE']
        for key, value in self._facts():
            lines += entry(key, value)
        student = self.student
        for key, value in ({} if student is None else student.commands).items():
            # To be copied: not wrapped.
            lines.append(f'  {key:<8} {value}')
        for note in self.notes:
            lines += entry('note', note)
        lines += entry('files', f'{self.folder}: {TEXT_FILE}, {JSON_FILE}')
        return '\n'.join(lines)

    def _facts(self) -> Iterable[tuple[str, str]]:
        if self.best is None:
            yield 'best', 'not validated'
        else:
            others = ', '.join(f'{k} {v:.4g}' for k, v in self.best.metrics.items() if k != self.best.main)
            at = '' if self.best.at is None else f' at {self.unit} {self.best.at} of {self.total}'
            value = self.best.metrics[self.best.main]
            yield 'best', f'{self.best.main} {value:.4g}{at}' + (f' ({others})' if others else '')
        if self.teacher is not None:
            yield 'teacher', f'{self.teacher:.4g} {self.teacher_on}'.rstrip()
        first, last = self.share
        if first is None or last is None:
            # Beside no labels it has none, and where every stage has an alpha of its own no one.
            on = f'KD was on in {self.asked} iterations; its share of all is not one number (alpha)'
            yield 'KD share', on if self.asked else 'KD was never on'
        else:
            yield 'KD share', f'kd_ratio {first:.3g} at the start, {last:.3g} at the end (KD over task loss)'
        yield 'took', duration(self.seconds) + self._of_teachers()
        if self.student is None:
            return
        yield 'student', f'{self.student.path}'
        yield '', f'{self.student.source}: {self.student.holds}'
        yield from self.student.files.items()

    def _of_teachers(self) -> str:
        each = [f'{name or "the teacher"} {1000 * seconds:.3g} ms' for name, seconds in self.teachers.items()]
        return f' (per batch: {", ".join(each)})' if each else ''

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data that strict JSON can hold."""
        student = self.student
        return strict(
            {
                'name': self.name,
                'unit': self.unit,
                'total': self.total,
                'seconds': self.seconds,
                'kd_ratio': {'start': self.share[0], 'end': self.share[1]},
                'best': None if self.best is None else {'at': self.best.at, 'metrics': dict(self.best.metrics)},
                'metric': None if self.best is None else self.best.main,
                'teacher': self.teacher,
                'teacher_on': self.teacher_on or None,
                'iterations_with_kd': self.asked,
                'teacher_seconds_per_batch': dict(self.teachers),
                'student': None
                if student is None
                else {
                    'path': student.path,
                    'source': student.source,
                    'files': dict(student.files),
                    'commands': dict(student.commands),
                },
                'notes': list(self.notes),
            }
        )

    def write(self) -> None:
        """Add the block to the summary of the start, and write it as JSON."""
        write_text(self.folder, self.text(), new=False)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        Path(self.folder, JSON_FILE).write_text(text + '\n', encoding='utf-8')


def write_text(folder: str | os.PathLike[str], text: str, new: bool = True) -> None:
    """Write the summary of a run to its folder.

    Args:
        folder: Where the log of the run is.
        text: What was printed.
        new: Whether it takes the place of what is there, of an earlier run in the same folder.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, TEXT_FILE), 'w' if new else 'a', encoding='utf-8') as file:
        file.write(text if new else f'\n\n{text}')
        file.write('\n')


def strict(value: Any) -> Any:
    """Plain data without NaN and infinities, which strict JSON does not know: they become None."""
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``1 h 02 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02d} min'
    return f'{minutes} min {rest:02d} s' if minutes else f'{rest} s'


def shorter(path: str | os.PathLike[str]) -> str:
    """A path as one would type it here."""
    relative = os.path.relpath(path)
    return os.fspath(path) if relative.startswith(os.pardir) else Path(relative).as_posix()
