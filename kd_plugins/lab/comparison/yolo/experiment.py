"""The comparison itself: one teacher, and the same student plain, natively distilled and distilled, over seeds."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kd_plugins.config_files import config_folder
from kd_plugins.errors import DistillError, nearest
from kd_plugins.lab.comparison.experiment import PLAIN, TEACHER, TEACHER_SEED, Experiment, arm_name
from kd_plugins.lab.comparison.figures import Picture
from kd_plugins.lab.comparison.history import History
from kd_plugins.lab.comparison.phases import Phase
from kd_plugins.lab.comparison.yolo.logs import TrainerProgress, read_history
from kd_plugins.lab.comparison.yolo.tasks import TASKS, Task, image_files
from kd_plugins.recipes import find_recipe, is_name, names
from kd_plugins.recipes.options import combinations, load_recipes, split_recipes
from kd_plugins.yolo.callback import check_version, quiet
from kd_plugins.yolo.cli import overrides_of, split
from kd_plugins.yolo.recipe import read_recipe
from kd_plugins.yolo.teacher import find_teacher

#: Examples that this package ships.
EXAMPLES = config_folder('kd_plugins') / 'yolo'
NATIVE, DEFAULT = 'native', 'default'
#: What this comparison sets itself; elsewhere it would be overwritten without a word.
RESERVED = ('model', 'data', 'project', 'name', 'seed', 'resume', 'exist_ok', 'mode', 'task', 'distill_model', 'save')
NOTE = (
    '{names} and gain in points ({measured}), measured by its validator on last.pt. s/epoch: median seconds per epoch, '
    "validation included. Weights: in single precision. native is Ultralytics' own distill_model=."
)


@dataclass
class Comparison(Experiment):
    """What is compared.

    Attributes:
        teacher: A trained ``.pt`` (or the name of an official one), or a ``.yaml`` that is trained first.
        student: What the students start from, a ``.yaml`` or ``.pt``.
        data: Data set YAML.
        recipes: Distilled students: ``'native'`` (Ultralytics' ``distill_model=``), ``'default'`` (kd_plugins with its
            defaults), the name of a recipe or of a file in ``configs/yolo``, or a kd.yaml of your own.
        work_dir: Everything is written below it. A second call with the same settings repeats nothing.
        seeds: Seeds of the students.
        student_options: ``key=value`` for every student's training, as for ``yolo train``.
        teacher_options: The same for the teacher's training.
        jobs: Trainings that run at once. None: two where there is no GPU but more than one core.
        scenes: Images in the picture of detections.
        recipe_options: Changes to the recipes, one list for each time that ``--kd-options`` is given, see
            `kd_plugins.recipes.options.combinations`; every combination is an arm.
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
    recipe_options: Sequence[Sequence[str]] = ()
    unit: ClassVar[str] = 'epoch'
    step: ClassVar[str] = 'epoch'
    together: ClassVar[str] = 'validation'
    #: Ultralytics gives a training on the CPU all cores but one.
    plain_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_version()
        # Ultralytics puts relative projects below its own folder for runs.
        self.work_dir = Path(self.work_dir).absolute()
        if not self.trains_teacher:
            self.teacher = find_teacher(self.teacher)
        self.task = self._find_task()
        self.metrics = self.task.metrics
        self.note = NOTE.format(names=', '.join(self.metrics.names), measured=self.task.measured)
        arms = [arm for recipe in self.recipes for arm in self._arms(recipe)]
        self.words = dict(arms)
        if not self.recipes or len(self.words) < len(arms):
            raise DistillError('--kd needs at least one recipe, and every one of another name.')
        self.data = self.task.find_data(self.data)
        self._data: dict[str, Any] | None = None
        for where, options in (('--options', self.student_options), ('--teacher-options', self.teacher_options)):
            for word in options:
                key = word.partition('=')[0]
                if '=' not in word or key in RESERVED or key.startswith('kd'):
                    raise DistillError(
                        f'{where}: {word!r} cannot be given; write key=value of yolo train, but none of '
                        f'{", ".join(RESERVED)} and kd_*, which the comparison sets.'
                    )
        self.prepare()

    def _arms(self, given: str) -> list[tuple[str, list[str]]]:
        """Name and words for the command line of the students of a recipe; the teacher is added later."""
        if given == NATIVE:
            if self.recipe_options:
                raise DistillError(
                    f"--kd-options changes what kd_plugins distils, and {NATIVE} is Ultralytics' own distill_model=; "
                    f'leave {NATIVE} out, or --kd-options, and write --options dis=3 for its strength.'
                )
            return [(given, [])]
        if given == DEFAULT:
            sets = combinations(self.recipe_options)
            return [(arm_name(given, changes), self._defaults(changes)) for changes in sets]
        found = ','.join(map(self._recipe, split_recipes(given)))
        said = read_recipe(found)
        if said.get('recipe'):
            load_recipes(said['recipe'], self.task.recipes, '--kd', {})
        return [
            (arm_name(found, changes), [f'kd={found}', *(f'kd_{change}' for change in changes)])
            for changes in combinations(self.recipe_options)
        ]

    def _defaults(self, changes: Sequence[str]) -> list[str]:
        """Changes to what is distilled without a recipe, as words of the command line of a student."""
        words = [f'kd_{change}' for change in changes]
        for change, word in zip(changes, words, strict=True):
            try:
                split([word])
            except DistillError as error:
                raise DistillError(
                    f'--kd-options: {DEFAULT} is no recipe and has no {change.partition("=")[0]!r}; write e.g. '
                    'cls=0.5, box=2 or temperature=2 (yolo-kd help lists all that it has, with kd_), or name a recipe.'
                ) from error
        return words

    def _recipe(self, name: str) -> str:
        """The recipe as the command line of a student is told."""
        examples = [p.stem for p in EXAMPLES.glob('*.yaml')]
        if is_name(name) and name not in names():
            if name not in examples:
                known = [NATIVE, DEFAULT, *names(self.task.recipes), *examples]
                raise DistillError(f'--kd: there is no recipe {name!r}; {nearest(name, known)}')
            name = str(EXAMPLES / f'{name}.yaml')
        path = find_recipe(name, '--kd')
        if path.stem in (TEACHER, PLAIN, NATIVE, DEFAULT):
            raise DistillError(f'--kd: an arm cannot be called {path.stem!r}; rename the recipe.')
        return name if is_name(name) else str(path.absolute())

    def _find_task(self) -> Task:
        """The task of both models.

        Raises:
            DistillError: One is missing, or they have none in common that can be compared.
        """
        from ultralytics import YOLO

        found = []
        for where, spec in (('--teacher', self.teacher), ('--student', self.student)):
            try:
                with quiet():
                    found.append(YOLO(spec, verbose=False).task)
            except FileNotFoundError as error:
                raise DistillError(f'{where} {spec!r} does not exist.') from error
            if found[-1] not in TASKS:
                raise DistillError(f'{where} {spec!r} is a {found[-1]} model; what is compared are {", ".join(TASKS)}.')
        taught, task = found
        if taught != task:
            raise DistillError(
                f'--teacher is a {taught} model and --student a {task} model, which have no metric in common; give '
                'both of one task.'
            )
        return TASKS[task]

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
            given = [word.removeprefix('kd=') for word in self.words[arm] if word.startswith('kd=')]
            files = [find_recipe(entry).read_text() for recipes in given for entry in split_recipes(recipes)]
            changes = [word for word in self.words[arm] if not word.startswith('kd=')]
            recipe = '\n'.join([*files, *changes]) or None
            phase.settings = {**phase.settings, 'recipe': recipe, 'teacher': self.hash_of(teacher)}
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
            progress=self._progress(),
            # Killed before the first epoch was saved it begins again.
            resume=['resume=True', f'model={last}'] if last.is_file() else None,
            max_epochs=overrides_of(['train', *options]).get('epochs', 100),
            threads=self.threads,
        )

    def test(self, title: str, folder: Path, weights: Path) -> Phase:
        """The evaluation of a checkpoint, which also leaves what the picture shows."""
        # A teacher that is given as a file is evaluated as it teaches: at the students' image size.
        options = [*self.student_options, *(self.teacher_options if title == TEACHER else ())]
        size = overrides_of(['train', *options]).get('imgsz', self.task.size)
        command = [sys.executable, '-m', 'kd_plugins.lab.comparison.yolo.evaluate', str(weights), self.data]
        folder = folder / 'test'
        return Phase(
            title=f'evaluate {title}',
            folder=folder,
            command=[*command, str(folder / 'result.json'), '--imgsz', str(size), '--scenes', str(self._scenes)],
            settings=dict(
                weights=self.hash_of(weights),
                data=self._data_hashes(),
                size=size,
                scenes=self._scenes,
                task=self.task.name,
            ),
            progress=self._progress(),
            mode='test',
            threads=self.threads,
        )

    @property
    def _scenes(self) -> int:
        return self.scenes * self.task.pictures

    def _progress(self) -> TrainerProgress:
        return TrainerProgress(self.metrics.main, self.task.column)

    @property
    def distilled(self) -> Sequence[str]:
        """See `Experiment`, as for all that follows."""
        return list(self.words)

    @property
    def trains_teacher(self) -> bool:
        return not self.teacher.endswith('.pt')

    def teacher_weights(self) -> Path:
        return last_checkpoint(self.work_dir / TEACHER / 'train') if self.trains_teacher else Path(self.teacher)

    def last_checkpoint(self, folder: Path) -> Path:
        return last_checkpoint(folder)

    # ------------------------------------------------------------------ what came out
    def history(self, folder: Path) -> History:
        return read_history(folder, self.task.keys[0])

    def measured(self, test: Phase) -> tuple[float, ...]:
        return self.task.accuracy(_result(test)['metrics'])

    def parameters(self, arm: str, test: Phase) -> int:
        return _result(test)['parameters']

    def size(self, checkpoint: Path, test: Phase) -> int:
        return _result(test)['size']

    def picture(self, tests: Mapping[str, Phase]) -> Picture | None:
        return self.task.picture({name: _result(test) for name, test in tests.items()}, self.scenes)

    def metric(self, histories: Iterable[History]) -> str:
        return self.task.keys[0]

    def label(self, arm: str) -> str:
        names = {TEACHER: TEACHER, PLAIN: PLAIN, NATIVE: 'native distill_model', DEFAULT: 'kd_plugins'}
        return names.get(arm, f'kd_plugins: {arm.removeprefix(f"{DEFAULT} ")}')

    def facts(self) -> dict[str, str]:
        import ultralytics

        return {
            'teacher': _short(self.teacher) + (', trained here' if self.trains_teacher else ''),
            'student': _short(self.student),
            'data': os.path.relpath(self.data),
            'arms': ', '.join(self.words),
            'options': ' '.join(self.student_options),
            'options of the teacher': ' '.join(self.teacher_options) if self.trains_teacher else '',
            'ultralytics': ultralytics.__version__,
        }

    def _data_hashes(self) -> dict[str, Any]:
        """So that another data set at the same place is noticed."""
        if self._data is None:
            try:
                with quiet():
                    found = self.task.check_data(self.data)
            except Exception as error:
                first = ' '.join(str(error).split())
                raise DistillError(f'--data {self.data!r} cannot be used: {first}') from error
            images = [file for split in ('train', 'val') for file in image_files(found[split])]
            self._data = self.task.fingerprint(self.data, images)
        return self._data


def last_checkpoint(folder: Path) -> Path:
    """The ``last.pt`` of a run.

    Raises:
        DistillError: There is none.
    """
    path = folder / 'weights' / 'last.pt'
    if not path.is_file():
        raise DistillError(f'{folder} holds no weights/last.pt after the training.')
    return path


def _result(test: Phase) -> dict[str, Any]:
    return json.loads((test.folder / 'result.json').read_text())


def _short(spec: str) -> str:
    """A path as one would type it here; other names as they are."""
    return os.path.relpath(spec) if os.path.isabs(spec) else spec


def _content(spec: str) -> str:
    """What identifies a model: a file's content, or the name of an official one."""
    path = Path(spec)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else spec
