"""Teacher, plain student and distilled students over the same seeds: what every framework's comparison does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison.figures import Picture
from kd_plugins.lab.comparison.history import History
from kd_plugins.lab.comparison.phases import Display, Phase, clock, run_phases
from kd_plugins.lab.comparison.report import write_report
from kd_plugins.lab.comparison.table import Arm, Metrics, Result, text
from kd_plugins.recipes import is_name
from kd_plugins.recipes.options import split_recipes

TEACHER, PLAIN = 'teacher', 'plain'
TEACHER_SEED = 0
#: Which model: its arm (or `TEACHER`) and its seed.
Key = tuple[str, int]


def arm_name(recipe: str, words: Sequence[str] = ()) -> str:
    """What an arm is called, in tables and as a folder.

    Args:
        recipe: Names or files of recipes, with commas between them.
        words: Changes to them, ``'weight=3'``.
    """
    stems = '+'.join(entry if is_name(entry) else Path(entry).stem for entry in split_recipes(recipe))
    return ' '.join([stems, *(re.sub(r'[^\w.=+-]+', '_', word) for word in words)])


class Experiment(ABC):
    """What is compared in a framework, and how it is trained and measured there.

    Attributes:
        work_dir: Everything is written below it. A second call with the same settings repeats nothing.
        seeds: Seeds of the students.
        jobs: Trainings that run at once.
        cores: CPU cores of this process.
        title: Headline of the report.
        metrics: What the models are compared by.
        unit: What a training is counted in: ``'epoch'`` or ``'iteration'``.
        step: What the seconds in the table are for, see `kd_plugins.lab.comparison.table.header`.
        note: How the columns of the table were measured.
        together: What the seconds hold when several trainings run at once.
        plain_first: Whether plain students are trained beside the teacher, or beside the distilled ones.
    """

    work_dir: Path
    seeds: Sequence[int]
    jobs: int | None
    title: str
    metrics: Metrics
    unit: str
    step: ClassVar[str]
    note: str
    together: ClassVar[str]
    plain_first: ClassVar[bool]

    def prepare(self) -> None:
        """Check what all comparisons have in common; called by the constructors.

        Raises:
            DistillError: No seeds, or fewer than one training at once.
        """
        if not self.seeds:
            raise DistillError('--seeds must be at least 1.')
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        if self.jobs is None:
            # So that plain and distilled students run side by side, under the same conditions.
            self.jobs = 1 if torch.cuda.is_available() else min(2, self.cores)
        if self.jobs < 1:
            raise DistillError(f'--jobs must be at least 1, got {self.jobs}.')
        self._hashes: dict[Path, str] = {}

    # ------------------------------------------------------------------ what a framework says
    @property
    @abstractmethod
    def distilled(self) -> Sequence[str]:
        """Names of the distilled arms."""

    @property
    @abstractmethod
    def trains_teacher(self) -> bool:
        """Whether the teacher has no weights yet."""

    @abstractmethod
    def train_teacher(self) -> Phase:
        """The teacher's training."""

    @abstractmethod
    def train_student(self, arm: str, seed: int) -> Phase:
        """A student's training; the teacher's weights are there if ``arm`` is a distilled one."""

    @abstractmethod
    def teacher_weights(self) -> Path:
        """The teacher's checkpoint, given or trained."""

    @abstractmethod
    def last_checkpoint(self, folder: Path) -> Path:
        """The last checkpoint of a training; `DistillError` when there is none."""

    @abstractmethod
    def test(self, title: str, folder: Path, checkpoint: Path) -> Phase:
        """The evaluation of a checkpoint, which also leaves what the picture shows."""

    @abstractmethod
    def history(self, folder: Path) -> History:
        """What the training in a folder logged."""

    @abstractmethod
    def measured(self, test: Phase) -> tuple[float, ...]:
        """What an evaluation found: values in [0, 1], one for each of `metrics`."""

    @abstractmethod
    def parameters(self, arm: str, test: Phase) -> int:
        """Number of parameters of an arm's model."""

    @abstractmethod
    def picture(self, tests: Mapping[str, Phase]) -> Picture | None:
        """What the models found in some images, by row; None: no picture."""

    @abstractmethod
    def metric(self, histories: Iterable[History]) -> str:
        """Key of the first of `metrics` in the validation lines."""

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """What a reader needs to judge or repeat the figures, besides seeds and machine."""

    def label(self, arm: str) -> str:
        """What the table calls an arm."""
        return arm if arm in (TEACHER, PLAIN) else f'distilled: {arm}'

    # ------------------------------------------------------------------ for the frameworks
    @property
    def threads(self) -> int:
        """Threads of a training that runs beside others."""
        return max(1, self.cores // self.jobs)

    def hash_of(self, path: Path) -> str:
        """SHA-256 of a file, computed once."""
        if path not in self._hashes:
            self._hashes[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._hashes[path]


def compare(experiment: Experiment, display: Display | None = None) -> dict[str, Any]:
    """Run what is missing of a comparison, print its table and write its report.

    Args:
        experiment: What to compare.
        display: Where progress goes; default standard output.

    Returns:
        What ``results.json`` holds: the rows' figures per seed, and the seconds that this call took.

    Raises:
        DistillError: Something cannot run; the message says what, with the end of the log.
    """
    began = time.monotonic()
    display = display or Display()
    runs = _run(experiment, display)
    teacher = _arm(experiment, runs, TEACHER, [TEACHER_SEED])
    students = [_arm(experiment, runs, name, experiment.seeds) for name in (PLAIN, *experiment.distilled)]
    plain, *distilled = students
    display.say('\n' + text(teacher, plain, distilled, experiment.metrics, experiment.step))
    if experiment.jobs > 1:
        how = f'{experiment.jobs} trainings at once, {experiment.together} included.'
        display.say(f's/{experiment.step} of the students: {how}')
    seconds = time.monotonic() - began
    arms = {
        a.name: dict(parameters=a.parameters, runs=[_figures(r, experiment.metrics) for r in a.results])
        for a in (teacher, *students)
    }
    results = dict(seeds=list(experiment.seeds), arms=arms, seconds=seconds)
    (experiment.work_dir / 'results.json').write_text(json.dumps(results, indent=1))
    report = _report(experiment, runs, teacher, plain, distilled)
    display.say(f'\nreport: {report}\ntook {clock(seconds)} in this call')
    return results


@dataclass(frozen=True)
class _Runs:
    """What was trained and measured, by model."""

    weights: Mapping[Key, Path]
    tests: Mapping[Key, Phase]
    histories: Mapping[Key, History]


def _run(experiment: Experiment, display: Display) -> _Runs:
    """Train and evaluate what is missing."""
    trainings = _train(experiment, display)
    weights: dict[Key, Path] = {(TEACHER, TEACHER_SEED): experiment.teacher_weights()}
    weights |= {key: experiment.last_checkpoint(phase.folder) for key, phase in trainings.items()}
    folders: dict[Key, Path] = {(TEACHER, TEACHER_SEED): experiment.work_dir / TEACHER}
    folders |= {key: phase.folder.parent for key, phase in trainings.items()}
    tests = {
        key: experiment.test(TEACHER if key[0] == TEACHER else f'{key[0]}, seed {key[1]}', folders[key], path)
        for key, path in weights.items()
    }
    run_phases(list(tests.values()), display, experiment.jobs)
    return _Runs(weights, tests, {key: experiment.history(folder / 'train') for key, folder in folders.items()})


def _arm(experiment: Experiment, runs: _Runs, name: str, seeds: Sequence[int]) -> Arm:
    results = [
        Result(
            seed=seed,
            accuracy=experiment.measured(runs.tests[name, seed]),
            seconds=runs.histories[name, seed].seconds_per_iteration(),
            size=runs.weights[name, seed].stat().st_size,
        )
        for seed in seeds
    ]
    return Arm(experiment.label(name), experiment.parameters(name, runs.tests[name, seeds[0]]), results)


def _report(experiment: Experiment, runs: _Runs, teacher: Arm, plain: Arm, distilled: Sequence[Arm]) -> Path:
    seeds = experiment.seeds
    students = dict(zip((PLAIN, *experiment.distilled), (plain, *distilled), strict=True))
    shown = {teacher.name: runs.tests[TEACHER, TEACHER_SEED]}
    shown |= {arm.name: runs.tests[name, seeds[0]] for name, arm in students.items()}
    return write_report(
        experiment.work_dir,
        title=experiment.title,
        teacher=teacher,
        plain=plain,
        distilled=distilled,
        histories={arm.name: [runs.histories[name, seed] for seed in seeds] for name, arm in students.items()},
        metrics=experiment.metrics,
        metric=experiment.metric(runs.histories.values()),
        picture=experiment.picture(shown),
        note=experiment.note,
        facts={
            **experiment.facts(),
            'seeds': ', '.join(map(str, seeds)),
            'trainings at once': f'{experiment.jobs} (on {experiment.cores} cores)',
            'device': torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU',
            'torch': torch.__version__,
        },
        step=experiment.step,
        unit=experiment.unit,
    )


def _figures(result: Result, metrics: Metrics) -> dict[str, float]:
    accuracy = dict(zip(metrics.keys, result.accuracy, strict=True))
    return dict(seed=result.seed, **accuracy, seconds=result.seconds, size=result.size)


def _train(experiment: Experiment, display: Display) -> dict[Key, Phase]:
    """All trainings, in an order in which every distilled student finds its teacher."""
    first = [experiment.train_teacher()] if experiment.trains_teacher else []
    trainings: dict[Key, Phase] = {}
    if experiment.plain_first:
        trainings |= {(PLAIN, seed): experiment.train_student(PLAIN, seed) for seed in experiment.seeds}
    run_phases([*first, *trainings.values()], display, experiment.jobs)
    names = [*([] if experiment.plain_first else [PLAIN]), *experiment.distilled]
    others = {(arm, seed): experiment.train_student(arm, seed) for seed in experiment.seeds for arm in names}
    run_phases(list(others.values()), display, experiment.jobs)
    return trainings | others
