"""The comparison itself: one teacher, and the same student plain, natively distilled and distilled, over seeds."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_plugins.comparison.figures import Detections, Objects
from kd_plugins.comparison.phases import Display, Phase, clock, run_phases
from kd_plugins.comparison.report import write_report
from kd_plugins.comparison.table import Arm, Result, text
from kd_plugins.errors import DistillError, nearest
from kd_plugins.yolo.callback import check_version
from kd_plugins.yolo.cli import overrides_of
from kd_plugins.yolo.comparison.logs import MAP, TrainerProgress, read_history
from kd_plugins.yolo.recipe import read_recipe

RECIPES = Path(__file__).parents[3] / 'configs' / 'yolo'
TEACHER, PLAIN, NATIVE, DEFAULT = 'teacher', 'plain', 'native', 'default'
TEACHER_SEED = 0
#: What this comparison sets itself; elsewhere it would be overwritten without a word.
RESERVED = ('model', 'data', 'project', 'name', 'seed', 'resume', 'exist_ok', 'mode', 'task', 'distill_model', 'save')
NOTE = (
    'mAP, AP50 and gain in points (100 × mAP50-95 and mAP50 of Ultralytics), measured by its validator on last.pt. '
    's/epoch: median seconds per epoch, validation included. Checkpoints are last.pt after training. '
    "native is Ultralytics' own distill_model=."
)


@dataclass
class Comparison:
    """What is compared.

    Attributes:
        teacher: A trained ``.pt``, or a ``.yaml`` that is trained first.
        student: What the students start from, a ``.yaml`` or ``.pt``.
        data: Data set YAML.
        recipes: Distilled students: ``'native'`` (Ultralytics' ``distill_model=``), ``'default'`` (kd_plugins with its
            defaults), a recipe in ``configs/yolo`` or a kd.yaml of your own.
        work_dir: Everything is written below it. A second call with the same settings repeats nothing.
        seeds: Seeds of the students.
        student_options: ``key=value`` for every student's training, as for ``yolo train``.
        teacher_options: The same for the teacher's training.
        jobs: Trainings that run at once. None: two where there is no GPU but more than one core.
        scenes: Images in the picture of detections.
        title: Headline of the report.

    Raises:
        DistillError: Something is missing or cannot be compared.
    """

    teacher: str
    student: str
    data: str
    recipes: Sequence[str]
    work_dir: Path
    seeds: Sequence[int] = (0,)
    student_options: Sequence[str] = ()
    teacher_options: Sequence[str] = ()
    jobs: int | None = None
    scenes: int = 5
    title: str = 'Plain and distilled student in Ultralytics'
    _hashes: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_version()
        # Ultralytics puts relative projects below its own folder for runs.
        self.work_dir = Path(self.work_dir).absolute()
        if not self.seeds:
            raise DistillError('--seeds must be at least 1.')
        self.words = dict(map(self._arm, self.recipes))
        if not self.recipes or len(self.words) < len(self.recipes):
            raise DistillError('--kd needs at least one recipe, and every one of another name.')
        if not Path(self.data).is_file():
            raise DistillError(f'--data {self.data!r} does not exist; it is the YAML of a data set.')
        self.data = os.path.abspath(self.data)
        if self.teacher.endswith('.pt') and not Path(self.teacher).is_file():
            raise DistillError(f'--teacher {self.teacher!r} does not exist.')
        for where, options in (('--options', self.student_options), ('--teacher-options', self.teacher_options)):
            for word in options:
                key = word.partition('=')[0]
                if '=' not in word or key in RESERVED or key.startswith('kd'):
                    raise DistillError(
                        f'{where}: {word!r} cannot be given; write key=value of yolo train, but none of '
                        f'{", ".join(RESERVED)} and kd_*, which the comparison sets.'
                    )
        self._refuse_other_tasks()
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        if self.jobs is None:
            self.jobs = 1 if torch.cuda.is_available() else min(2, self.cores)
        if self.jobs < 1:
            raise DistillError(f'--jobs must be at least 1, got {self.jobs}.')

    def _arm(self, name: str) -> tuple[str, list[str]]:
        """Name and words for the command line of a distilled student; the teacher is added later."""
        if name in (NATIVE, DEFAULT):
            return name, []
        path = Path(name)
        if not path.is_file():
            path = RECIPES / f'{name}.yaml'
        if not path.is_file():
            known = [NATIVE, DEFAULT, *sorted(p.stem for p in RECIPES.glob('*.yaml'))]
            raise DistillError(f'--kd: there is no recipe {name!r}; {nearest(name, known)}')
        if path.stem in (TEACHER, PLAIN, NATIVE, DEFAULT):
            raise DistillError(f'--kd: an arm cannot be called {path.stem!r}; rename the recipe.')
        read_recipe(path)
        return path.stem, [f'kd={path.absolute()}']

    def _refuse_other_tasks(self) -> None:
        from ultralytics import YOLO

        for where, spec in (('--teacher', self.teacher), ('--student', self.student)):
            try:
                task = YOLO(spec, verbose=False).task
            except FileNotFoundError as error:
                raise DistillError(f'{where} {spec!r} does not exist.') from error
            if task != 'detect':
                raise DistillError(f'{where} {spec!r} is a {task} model; box mAP of detectors is what is compared.')

    # ------------------------------------------------------------------ phases
    def train_teacher(self) -> Phase:
        """The teacher's training."""
        return self._training(TEACHER, self.work_dir / TEACHER, self.teacher, self.teacher_options, TEACHER_SEED)

    def train_student(self, arm: str, seed: int) -> Phase:
        """A student's training; ``arm`` is ``'plain'`` or one of `words`."""
        phase = self._training(
            f'{arm}, seed {seed}', self.work_dir / f'seed{seed}' / arm, self.student, self.student_options, seed
        )
        if arm != PLAIN:
            teacher = self.teacher_weights().absolute()
            key = 'distill_model' if arm == NATIVE else 'kd_teacher'
            phase.command = [*phase.command, *self.words[arm], f'{key}={teacher}']
            recipe = Path(self.words[arm][0].removeprefix('kd=')).read_text() if self.words[arm] else None
            phase.settings = {**phase.settings, 'recipe': recipe, 'teacher': self._hash(teacher)}
        return phase

    def _training(self, title: str, folder: Path, model: str, options: Sequence[str], seed: int) -> Phase:
        folder = folder / 'train'
        words = [
            'train',
            f'model={model}',
            f'data={self.data}',
            f'project={folder.parent}',
            f'name={folder.name}',
            'exist_ok=True',
            f'seed={seed}',
            *options,
        ]
        last = folder / 'weights' / 'last.pt'
        return Phase(
            title=f'train {title}',
            folder=folder,
            command=[sys.executable, '-m', 'kd_plugins.yolo.cli', *words],
            settings=dict(model=_content(model), data=self._data_hashes(), options=sorted(options), seed=seed),
            progress=TrainerProgress(),
            # Killed before the first epoch was saved it begins again.
            resume=['resume=True', f'model={last}'] if last.is_file() else None,
            max_epochs=overrides_of(['train', *options]).get('epochs', 100),
            threads=max(1, self.cores // self.jobs),
        )

    def test(self, title: str, folder: Path, weights: Path) -> Phase:
        """The evaluation of a checkpoint, which also leaves its detections for the picture."""
        options = self.teacher_options if title == TEACHER else self.student_options
        size = overrides_of(['train', *options]).get('imgsz', 640)
        command = [sys.executable, '-m', 'kd_plugins.yolo.comparison.evaluate', str(weights), self.data]
        folder = folder / 'test'
        return Phase(
            title=f'evaluate {title}',
            folder=folder,
            command=[*command, str(folder / 'result.json'), '--imgsz', str(size), '--scenes', str(self.scenes)],
            settings=dict(weights=self._hash(weights), data=self._data_hashes(), size=size, scenes=self.scenes),
            progress=TrainerProgress(),
            mode='test',
            threads=max(1, self.cores // self.jobs),
        )

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher has no weights yet."""
        return not self.teacher.endswith('.pt')

    def teacher_weights(self) -> Path:
        """The teacher's checkpoint, given or trained."""
        return last_checkpoint(self.work_dir / TEACHER / 'train') if self.trains_teacher else Path(self.teacher)

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._hashes[path]

    def _data_hashes(self) -> dict[str, Any]:
        """The YAML and the size of what it names, so that another data set at the same place is noticed."""
        root = Path(self.data).parent
        labels = sorted(root.rglob('labels/**/*.txt'))
        digest = hashlib.sha256()
        for path in labels:
            digest.update(path.read_bytes())
        return dict(yaml=Path(self.data).read_text(), labels=len(labels), digest=digest.hexdigest())


def compare(comparison: Comparison, display: Display | None = None) -> dict[str, Any]:
    """Run what is missing of a comparison, print its table and write its report.

    Args:
        comparison: What to compare.
        display: Where progress goes; default standard output.

    Returns:
        What ``results.json`` holds: the rows' figures per seed, and the seconds that this call took.

    Raises:
        DistillError: Something cannot run; the message says what, with the end of the log.
    """
    began = time.monotonic()
    display = display or Display()
    work_dir, seeds, jobs = comparison.work_dir, comparison.seeds, comparison.jobs
    names = [PLAIN, *comparison.words]
    # Plain students do not wait for the teacher.
    trainings = {(PLAIN, seed): comparison.train_student(PLAIN, seed) for seed in seeds}
    first = [comparison.train_teacher()] if comparison.trains_teacher else []
    run_phases([*first, *trainings.values()], display, jobs)
    distilled = {(arm, seed): comparison.train_student(arm, seed) for seed in seeds for arm in comparison.words}
    run_phases(list(distilled.values()), display, jobs)
    trainings |= distilled

    weights = {(TEACHER, TEACHER_SEED): comparison.teacher_weights()}
    weights |= {key: last_checkpoint(phase.folder) for key, phase in trainings.items()}
    folders = {(TEACHER, TEACHER_SEED): work_dir / TEACHER}
    folders |= {key: phase.folder.parent for key, phase in trainings.items()}
    tests = {
        key: comparison.test(TEACHER if key[0] == TEACHER else f'{key[0]}, seed {key[1]}', folders[key], path)
        for key, path in weights.items()
    }
    run_phases(list(tests.values()), display, jobs)

    measured = {key: json.loads((phase.folder / 'result.json').read_text()) for key, phase in tests.items()}
    histories = {key: read_history(folder / 'train') for key, folder in folders.items()}

    def arm(name: str, keys: Sequence[tuple[str, int]]) -> Arm:
        results = [
            Result(
                seed=key[1],
                map=measured[key]['map'],
                map50=measured[key]['map50'],
                seconds=histories[key].seconds_per_iteration(),
                size=weights[key].stat().st_size,
            )
            for key in keys
        ]
        titles = {TEACHER: TEACHER, PLAIN: PLAIN, NATIVE: 'native distill_model', DEFAULT: 'kd_plugins'}
        return Arm(titles.get(name, f'kd_plugins: {name}'), measured[keys[0]]['parameters'], results)

    teacher = arm(TEACHER, [(TEACHER, TEACHER_SEED)])
    plain, *others = (arm(name, [(name, seed) for seed in seeds]) for name in names)
    display.say('\n' + text(teacher, plain, others, 'epoch'))
    if jobs > 1:
        display.say(f's/epoch: {jobs} trainings at once, validation included.')
    seconds = time.monotonic() - began
    every = (teacher, plain, *others)
    results = dict(
        seeds=list(seeds),
        arms={a.name: dict(parameters=a.parameters, runs=[vars(r) for r in a.results]) for a in every},
        seconds=seconds,
    )
    (work_dir / 'results.json').write_text(json.dumps(results, indent=1))
    shown = [(TEACHER, TEACHER_SEED), *((n, seeds[0]) for n in names)]
    report = write_report(
        work_dir,
        title=comparison.title,
        teacher=teacher,
        plain=plain,
        distilled=others,
        histories={a.name: [histories[n, s] for s in seeds] for a, n in zip((plain, *others), names, strict=True)},
        metric=MAP,
        detections=_detections({a.name: measured[key] for a, key in zip(every, shown, strict=True)}),
        note=NOTE,
        facts=_facts(comparison),
        step='epoch',
    )
    display.say(f'\nreport: {report}\ntook {clock(seconds)} in this call')
    return results


def last_checkpoint(folder: Path) -> Path:
    """The ``last.pt`` of a run.

    Raises:
        DistillError: There is none.
    """
    path = folder / 'weights' / 'last.pt'
    if not path.is_file():
        raise DistillError(f'{folder} holds no weights/last.pt after the training.')
    return path


def _detections(measured: dict[str, dict[str, Any]]) -> Detections | None:
    first = next(iter(measured.values()))
    images = [Path(image['file']).name for image in first['images']]
    if not images:
        return None

    def objects(rows: Sequence[Sequence[float]], scored: bool) -> Objects:
        table = np.asarray(rows, np.float64).reshape(-1, 6 if scored else 5)
        return Objects(table[:, :4], table[:, 4].astype(int), table[:, 5] if scored else None)

    return Detections(
        images=images,
        files={name: image['file'] for name, image in zip(images, first['images'], strict=True)},
        truth={name: objects(image['truth'], False) for name, image in zip(images, first['images'], strict=True)},
        found={
            model: {name: objects(i['found'], True) for name, i in zip(images, m['images'], strict=True)}
            for model, m in measured.items()
        },
        classes=first['names'],
    )


def _content(spec: str) -> str:
    """What identifies a model: a file's content, or the name of an official one."""
    path = Path(spec)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else spec


def _facts(comparison: Comparison) -> dict[str, str]:
    """What a reader needs to judge or repeat the figures."""
    import ultralytics

    return {
        'teacher': comparison.teacher + (', trained here' if comparison.trains_teacher else ''),
        'student': comparison.student,
        'data': os.path.relpath(comparison.data),
        'arms': ', '.join(comparison.words),
        'options': ' '.join(comparison.student_options),
        'options of the teacher': ' '.join(comparison.teacher_options) if comparison.trains_teacher else '',
        'seeds': ', '.join(map(str, comparison.seeds)),
        'trainings at once': f'{comparison.jobs} (on {comparison.cores} cores)',
        'device': torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU',
        'versions': f'ultralytics {ultralytics.__version__}, torch {torch.__version__}',
    }
