"""Teacher, plain student and distilled students over the same seeds: what every framework's comparison does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from kd_plugins import __version__
from kd_plugins.distiller.ending import shorter, strict
from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison.figures import Picture
from kd_plugins.lab.comparison.history import History
from kd_plugins.lab.comparison.phases import Display, Phase, clock, run_phases
from kd_plugins.lab.comparison.report import Section, write_report
from kd_plugins.lab.comparison.table import Arm, Metrics, Result, interval, joint_text, mean_and_spread, text
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
    def size(self, checkpoint: Path, test: Phase) -> int:
        """Bytes of the weights in a checkpoint, see `kd_plugins.lab.comparison.table.weights_size`."""

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
    (found,) = _run([experiment], display)
    display.say('\n' + text(found.teacher, found.plain, found.distilled, experiment.metrics, experiment.step))
    if experiment.jobs > 1:
        how = f'{experiment.jobs} trainings at once, {experiment.together} included.'
        display.say(f's/{experiment.step} of the students: {how}')
    seconds = time.monotonic() - began
    results = dict(seeds=list(experiment.seeds), arms=found.figures(), seconds=seconds)
    _write(experiment.work_dir, results)
    report = write_report(experiment.work_dir, experiment.title, [found.section()])
    display.say(f'\nreport: {report}\ntook {clock(seconds)} in this call')
    return results


def compare_all(
    experiments: Mapping[str, Experiment], work_dir: Path, title: str, display: Display | None = None
) -> dict[str, Any]:
    """Several comparisons as one, with one table and one report: what waits for nothing of its own fills their gaps.

    Args:
        experiments: By what the table calls them.
        work_dir: Where the report goes.
        title: Its headline.
        display: Where progress goes; default standard output.

    Returns:
        What ``results.json`` holds: ``arms`` by the names of the experiments, and the seconds that this call took.

    Raises:
        DistillError: Something cannot run.
    """
    began = time.monotonic()
    display = display or Display()
    found = dict(zip(experiments, _run(list(experiments.values()), display), strict=True))
    groups = {name: (one.experiment.metrics, one.teacher, one.plain, one.distilled) for name, one in found.items()}
    display.say('\n' + joint_text(groups))
    seconds = time.monotonic() - began
    results = dict(arms={name: one.figures() for name, one in found.items()}, seconds=seconds)
    work_dir.mkdir(parents=True, exist_ok=True)
    _write(work_dir, results)
    report = write_report(work_dir, title, [one.section(name) for name, one in found.items()], groups)
    display.say(f'\nreport: {report}\ntook {clock(seconds)} in this call')
    return results


def _write(folder: Path, results: Mapping[str, Any]) -> None:
    (folder / 'results.json').write_text(json.dumps(strict(results), indent=1, allow_nan=False))


class _Found:
    """What comes out of an experiment: its models as they are trained, what they are worth once all are evaluated.

    Args:
        experiment: It.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.weights: dict[Key, Path] = {}
        self.folders: dict[Key, Path] = {}
        self.tests: dict[Key, Phase] = {}

    def teacher_is_trained(self) -> list[Phase]:
        """Take the teacher in, which may be given; its evaluation."""
        key = TEACHER, TEACHER_SEED
        return [self._take_in(key, self.experiment.teacher_weights(), self.experiment.work_dir / TEACHER)]

    def students_are_trained(self, trainings: Mapping[Key, Phase]) -> list[Phase]:
        """Take students in; their evaluations."""
        last = self.experiment.last_checkpoint
        return [self._take_in(key, last(p.folder), p.folder.parent) for key, p in trainings.items()]

    def _take_in(self, key: Key, weights: Path, folder: Path) -> Phase:
        self.weights[key], self.folders[key] = weights, folder
        self.tests[key] = self.experiment.test(_title(key), folder, weights)
        return self.tests[key]

    def read(self) -> None:
        """Read logs and evaluations, when these are done."""
        experiment = self.experiment
        self.histories = {key: experiment.history(folder / 'train') for key, folder in self.folders.items()}
        self.teacher = self._arm(TEACHER, [TEACHER_SEED])
        self.plain, *self.distilled = (self._arm(n, experiment.seeds) for n in (PLAIN, *experiment.distilled))

    def figures(self) -> dict[str, Any]:
        """For ``results.json``, by row."""
        found: dict[str, Any] = {
            a.name: dict(parameters=a.parameters, runs=[_figures(r, self.experiment.metrics) for r in a.results])
            for a in (self.teacher, self.plain, *self.distilled)
        }
        for arm in self.distilled:
            gains = arm.gains(self.plain)
            mean, spread = mean_and_spread(gains)
            low, high = interval(gains)
            found[arm.name]['gain'] = dict(mean=mean, spread=spread, low=low, high=high, confidence=0.95)
        return found

    def section(self, name: str = '') -> Section:
        """Its part of a report; with the name that it has among others."""
        experiment, seeds = self.experiment, self.experiment.seeds
        students = dict(zip((PLAIN, *experiment.distilled), (self.plain, *self.distilled), strict=True))
        shown = {self.teacher.name: self.tests[TEACHER, TEACHER_SEED]}
        shown |= {arm.name: self.tests[name, seeds[0]] for name, arm in students.items()}
        return Section(
            name=name,
            teacher=self.teacher,
            plain=self.plain,
            distilled=self.distilled,
            histories={arm.name: [self.histories[name, seed] for seed in seeds] for name, arm in students.items()},
            metrics=experiment.metrics,
            metric=experiment.metric(self.histories.values()),
            picture=experiment.picture(shown),
            note=experiment.note,
            facts={
                **experiment.facts(),
                'seeds': ', '.join(map(str, seeds)),
                'trainings at once': f'{experiment.jobs} (on {experiment.cores} cores)',
                'device': torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU',
                'torch': torch.__version__,
                'kd_plugins': __version__,
                **self._files(),
            },
            step=experiment.step,
            unit=experiment.unit,
        )

    def _files(self) -> dict[str, str]:
        return {f'checkpoint of {_title(key)}': shorter(path) for key, path in self.weights.items()}

    def _arm(self, name: str, seeds: Sequence[int]) -> Arm:
        experiment = self.experiment
        results = [
            Result(
                seed=seed,
                accuracy=experiment.measured(self.tests[name, seed]),
                seconds=self.histories[name, seed].seconds_per_iteration(),
                size=experiment.size(self.weights[name, seed], self.tests[name, seed]),
                weights=shorter(self.weights[name, seed]),
            )
            for seed in seeds
        ]
        return Arm(experiment.label(name), experiment.parameters(name, self.tests[name, seeds[0]]), results)


def _title(key: Key) -> str:
    return TEACHER if key[0] == TEACHER else f'{key[0]}, seed {key[1]}'


def _run(experiments: Sequence[Experiment], display: Display) -> list[_Found]:
    """Train and evaluate what is missing, in an order in which every distilled student finds its teacher.

    Evaluations wait for the trainings behind them only where there is no room for both.
    """
    jobs = max(e.jobs for e in experiments)
    found = [_Found(e) for e in experiments]
    teachers = [e.train_teacher() for e in experiments if e.trains_teacher]
    if len(teachers) > 1 and jobs > 1:
        for phase, experiment in zip(teachers, experiments, strict=False):
            phase.threads = experiment.threads  # none is alone
    first = [_students(e, [PLAIN] if e.plain_first else []) for e in experiments]
    run_phases([*teachers, *_flat(first)], display, jobs)
    tests = [t for one, phases in zip(found, first, strict=True) for t in _evaluations(one, phases)]
    others = [_students(e, [*([] if e.plain_first else [PLAIN]), *e.distilled]) for e in experiments]
    run_phases([*_flat(others), *tests], display, jobs)
    tests = [t for one, phases in zip(found, others, strict=True) for t in one.students_are_trained(phases)]
    run_phases(tests, display, jobs)
    for one in found:
        one.read()
    return found


def _flat(students: Sequence[Mapping[Key, Phase]]) -> list[Phase]:
    return [phase for phases in students for phase in phases.values()]


def _evaluations(one: _Found, trainings: Mapping[Key, Phase]) -> list[Phase]:
    return [*one.teacher_is_trained(), *one.students_are_trained(trainings)]


def _figures(result: Result, metrics: Metrics) -> dict[str, Any]:
    accuracy = dict(zip(metrics.keys, result.accuracy, strict=True))
    return dict(seed=result.seed, **accuracy, seconds=result.seconds, size=result.size, weights=result.weights)


def _students(experiment: Experiment, arms: Sequence[str]) -> dict[Key, Phase]:
    return {(arm, seed): experiment.train_student(arm, seed) for seed in experiment.seeds for arm in arms}
