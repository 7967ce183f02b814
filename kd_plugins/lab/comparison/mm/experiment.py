"""The comparison itself: one teacher, the same student plain and distilled, over seeds."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope

from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison.experiment import PLAIN, TEACHER, TEACHER_SEED, Experiment, arm_name
from kd_plugins.lab.comparison.figures import Picture
from kd_plugins.lab.comparison.history import History
from kd_plugins.lab.comparison.mm.classifications import read_classifications
from kd_plugins.lab.comparison.mm.detections import read_detections
from kd_plugins.lab.comparison.mm.logs import RunnerProgress, read_history, read_test_metrics
from kd_plugins.lab.comparison.mm.segmentations import read_segmentations
from kd_plugins.lab.comparison.mm.tasks import DETECTION, MULTI_LABEL, SEGMENTATION, find_evaluator
from kd_plugins.lab.comparison.phases import Phase
from kd_plugins.lab.comparison.table import weights_size
from kd_plugins.mm.configs import load_config, merge_options, without_pretrained
from kd_plugins.mm.recipes import read_recipes
from kd_plugins.recipes import find_recipe
from kd_plugins.recipes.options import combinations, split_recipes
from kd_plugins.teachers import load_checkpoint

DETECTIONS, LABEL_MAPS, CLASSES = 'detections.pkl', 'label_maps', 'classes.pkl'
NOTE = (
    '{names} and gain in points ({measured}), measured by kd-plugins test on the last checkpoint. s/iter: median '
    'seconds per training iteration, data loading included. Weights: in single precision, without optimizer and EMA.'
)


@dataclass
class Comparison(Experiment):
    """What is compared.

    Attributes:
        teacher: Config of the teacher.
        student: Config of the student.
        recipes: Recipes by name or file; each is one distilled arm, and so are several with commas between them.
        work_dir: Everything is written below it. A second call with the same settings repeats nothing.
        seeds: Seeds of the students.
        teacher_checkpoint: Weights of the teacher; None trains it first.
        student_options: ``key=value`` overrides of the student's config.
        teacher_options: ``key=value`` overrides of the teacher's config, for its training only.
        jobs: Trainings that run at once. None: two where there is no GPU but more than one core, so that the plain
            and the distilled student run side by side, under the same conditions.
        scenes: Images in the picture of what the models find.
        recipe_options: Changes to the recipes, one list for each time that ``--kd-options`` is given, see
            `kd_plugins.recipes.options.combinations`; every combination is an arm.
        title: Headline of the report.
    """

    teacher: str
    student: str
    recipes: Sequence[str]
    work_dir: Path
    seeds: Sequence[int] = (0,)
    teacher_checkpoint: str | None = None
    student_options: Sequence[str] = ()
    teacher_options: Sequence[str] = ()
    jobs: int | None = None
    scenes: int = 5
    title: str = 'Plain and distilled student'
    recipe_options: Sequence[Sequence[str]] = ()
    step: ClassVar[str] = 'iter'
    together: ClassVar[str] = 'data loading'
    #: The teacher uses all cores alone; then plain and distilled students run side by side.
    plain_first: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.work_dir = Path(self.work_dir)
        if not self.recipes:
            raise DistillError('--kd needs at least one recipe.')
        for recipe in (entry for given in self.recipes for entry in split_recipes(given)):
            find_recipe(recipe, '--kd')
        pairs = [(recipe, words) for recipe in self.recipes for words in combinations(self.recipe_options)]
        self.arms = dict(zip(_arm_names(pairs), pairs, strict=True))
        if self.teacher_checkpoint and not Path(self.teacher_checkpoint).is_file():
            raise DistillError(f'--teacher-checkpoint {self.teacher_checkpoint!r} does not exist.')
        self.prepare()
        self._sizes: dict[str, int] = {}
        self._data: dict[str, dict[str, str]] = {}
        self._heads: list[str] = []
        # Its notes on environment variables in configs would stand between the lines of progress.
        MMLogger.get_current_instance().setLevel('WARNING')
        self.teacher_config = read_config(self.teacher, self.teacher_options, '--teacher')
        self.student_config = read_config(self.student, self.student_options, '--student')
        self.task = find_evaluator(self.student_config, '--student').task
        self._recipes = {arm: read_recipes(given, self.task.name, words) for arm, (given, words) in self.arms.items()}
        taught = find_evaluator(self.teacher_config, '--teacher').task
        if taught != self.task:
            raise DistillError(
                f'--teacher is measured by {" and ".join(taught.metrics.names)}, --student by '
                f'{" and ".join(self.task.metrics.names)}: give both the same test_evaluator.'
            )
        self.metrics = self.task.metrics
        self.unit = 'epoch' if _max_epochs(self.student_config) else 'iteration'
        self.note = NOTE.format(names=', '.join(self.metrics.names), measured=self.task.measured)

    # ------------------------------------------------------------------ phases
    def train_teacher(self) -> Phase:
        """The teacher's training."""
        return self._training(
            TEACHER, self.work_dir / TEACHER, self.teacher, self.teacher_config, self.teacher_options, TEACHER_SEED, 1
        )

    def train_student(self, arm: str, seed: int) -> Phase:
        """A student's training; ``arm`` is ``'plain'`` or one of `arms`."""
        extra, settings = [], {}
        if arm != PLAIN:
            checkpoint = self.teacher_weights()
            recipe, words = self.arms[arm]
            extra = ['--kd', recipe, '--teacher', self.teacher, '--teacher-checkpoint', str(checkpoint)]
            extra += ['--kd-options', *words] if words else []
            settings = dict(
                recipe=self._recipes[arm],
                teacher=Config(dict(model=self.teacher_config.model)).pretty_text,
                teacher_weights=self.hash_of(checkpoint),
            )
        phase = self._training(
            f'{arm}, seed {seed}',
            self.work_dir / f'seed{seed}' / arm,
            self.student,
            self.student_config,
            self.student_options,
            seed,
            self.jobs,
        )
        phase.command = [*phase.command, *extra]
        phase.settings = {**phase.settings, **settings}
        return phase

    def _training(
        self, title: str, folder: Path, spec: str, config: Config, options: Sequence[str], seed: int, jobs: int
    ) -> Phase:
        folder = folder / 'train'
        command = [*_command('train'), spec, '--work-dir', str(folder), '--seed', str(seed), *_options(options)]
        return Phase(
            title=f'train {title}',
            folder=folder,
            command=command,
            settings=dict(config=config.pretty_text, seed=seed, data=self._data_hashes(config)),
            progress=self._progress(),
            resume=['--resume'],
            max_epochs=_max_epochs(config),
            threads=max(1, self.cores // jobs),
        )

    def test(self, title: str, folder: Path, checkpoint: Path) -> Phase:
        """The evaluation of a checkpoint, which also leaves what the picture shows."""
        teacher = title == TEACHER
        spec, config = (self.teacher, self.teacher_config) if teacher else (self.student, self.student_config)
        options = self.teacher_options if teacher else self.student_options
        folder = folder / 'test'
        command = [*_command('test'), spec, str(checkpoint), '--work-dir', str(folder)]
        if self.task == SEGMENTATION:
            # Not --out: it dumps the logits too, some GB for a few hundred photographs.
            options = [*options, f'{find_evaluator(config, title).key}.output_dir={folder / LABEL_MAPS}']
        else:
            command += ['--out', str(folder / self._predictions)]
        return Phase(
            title=f'evaluate {title}',
            folder=folder,
            command=[*command, *_options(options)],
            settings=dict(config=config.pretty_text, weights=self.hash_of(checkpoint), data=self._data_hashes(config)),
            progress=self._progress(),
            mode='test',
            threads=self.threads,
        )

    @property
    def _predictions(self) -> str:
        return DETECTIONS if self.task == DETECTION else CLASSES

    def _data_hashes(self, config: Config) -> dict[str, str]:
        # Read once: a data set of a million files takes a while.
        key = config.pretty_text
        if key not in self._data:
            self._data[key] = data_hashes(config)
        return self._data[key]

    def _progress(self) -> RunnerProgress:
        return RunnerProgress(self.metrics.main, self.task.logged[0], self.task.whole)

    @property
    def distilled(self) -> Sequence[str]:
        """See `Experiment`, as for all that follows."""
        return list(self.arms)

    @property
    def trains_teacher(self) -> bool:
        return not self.teacher_checkpoint

    def teacher_weights(self) -> Path:
        if self.teacher_checkpoint:
            return Path(self.teacher_checkpoint)
        return last_checkpoint(self.work_dir / TEACHER / 'train')

    def last_checkpoint(self, folder: Path) -> Path:
        return last_checkpoint(folder)

    # ------------------------------------------------------------------ what came out
    def history(self, folder: Path) -> History:
        history = read_history(folder)
        history.val = {step: self.task.fractions(line) for step, line in history.val.items()}
        alpha = self._recipes.get(folder.parent.name, {}).get('alpha')
        if alpha is not None:
            history.train = {step: _without_balance(line, alpha) for step, line in history.train.items()}
        return history

    def measured(self, test: Phase) -> tuple[float, ...]:
        metrics = read_test_metrics(test.folder)
        heads = {k.partition('top1_')[2].replace('_', ' '): v for k, v in metrics.items() if 'top1_' in k}
        if heads:
            shares = ', '.join(f'{name} {share:.1f}' for name, share in heads.items())
            self._heads.append(f'{test.title.removeprefix("evaluate ")}: {shares}')
        return self.task.accuracy(metrics)

    def parameters(self, arm: str, test: Phase) -> int:
        config = self.teacher_config if arm == TEACHER else self.student_config
        if arm not in self._sizes:
            self._sizes[arm] = count_parameters(config)
        return self._sizes[arm]

    def size(self, checkpoint: Path, test: Phase) -> int:
        saved = load_checkpoint(str(checkpoint), 'the checkpoint')
        return weights_size(saved.get('state_dict', saved))

    def picture(self, tests: Mapping[str, Phase]) -> Picture | None:
        if self.task == SEGMENTATION:
            folders = {name: test.folder / LABEL_MAPS for name, test in tests.items()}
            options = find_evaluator(self.student_config, '--student').options
            return read_segmentations(folders, self.student_config, options.get('ignore_index', 255), self.scenes)
        files = {name: test.folder / self._predictions for name, test in tests.items()}
        if self.task == DETECTION:
            return read_detections(files, _dataset(self.student_config.test_dataloader), self.scenes)
        if self.task == MULTI_LABEL:
            return None  # a guess at one class would not do
        # A line of small pictures takes the place of one scene.
        return read_classifications(files, self.student_config, 4 * self.scenes)

    def metric(self, histories: Iterable[History]) -> str:
        suffix = self.task.logged[0]
        keys = (k for h in histories for line in h.val.values() for k in line if k.endswith(suffix))
        return next(keys, suffix)

    def facts(self) -> dict[str, str]:
        weights = f', weights {self.teacher_checkpoint}' if self.teacher_checkpoint else ', trained here'
        return {
            'teacher': _short(self.teacher) + weights,
            'student': _short(self.student),
            'recipes': ', '.join(map(_short, self.recipes)),
            **({'top-1 of each head alone': '; '.join(self._heads)} if self._heads else {}),
        }


def _without_balance(line: Mapping[str, float], alpha: float) -> dict[str, float]:
    """A line of a training log in which the student's own loss is as large as without distillation.

    A recipe's ``alpha`` scales it by ``1 - alpha`` while distillation is on; in the curves that would look like a gain.
    """
    kd = sum(v for k, v in line.items() if k.startswith('loss_kd_'))
    if not kd:  # before its start, or after its stop
        return dict(line)
    own = (line['loss'] - kd) / (1 - alpha) if alpha < 1 else math.nan
    return {**line, 'loss': kd + own}


def read_config(spec: str, options: Sequence[str], where: str) -> Config:
    """A config with ``key=value`` overrides applied as ``kd-plugins test`` does."""
    config = load_config(spec, where)
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    found = parser.parse_args(['--cfg-options', *options]).cfg_options if options else None
    merge_options(config, found, tested=True)
    return config


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint that MMEngine wrote last.

    Raises:
        DistillError: There is none.
    """
    record = folder / 'last_checkpoint'
    path = Path(record.read_text().strip()) if record.is_file() else None
    # Written as an absolute path when the run began: the folder may have been moved since.
    path = folder / path.name if path is not None else None
    if path is None or not path.is_file():
        raise DistillError(
            f'{folder} holds no checkpoint after the training; does the config save the last epoch '
            'or iteration (default_hooks.checkpoint)?'
        )
    return path


def count_parameters(config: Config) -> int:
    """Number of parameters of a config's model."""
    # mmseg prints which optional packages it has not found when it is imported, and its losses warn of their defaults.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        init_default_scope(config.get('default_scope', 'mmengine'))
        model = MODELS.build(without_pretrained(config.model))
    return sum(p.numel() for p in model.parameters())


def _command(name: str) -> list[str]:
    return [sys.executable, '-m', 'kd_plugins.cli', name]


def _options(options: Sequence[str]) -> list[str]:
    return ['--cfg-options', *options] if options else []


def _arm_names(pairs: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    names = [arm_name(recipe, words) for recipe, words in pairs]
    for name in names:
        if names.count(name) > 1 or name == PLAIN:
            raise DistillError(f'--kd: two arms would be called {name!r}; rename a recipe file.')
    return names


def _dataset(loader: Mapping[str, Any]) -> Mapping[str, Any]:
    dataset = loader['dataset']
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def data_hashes(config: Config) -> dict[str, str]:
    """Hashes of the data, so that another data set at the same place is noticed.

    Of annotation files and arrays the content; of folders of images and label maps the names and sizes, as there may
    be thousands of files.
    """
    hashes = {}
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = _dataset(config[name]) if config.get(name) else {}
        root = Path(dataset.get('data_root') or dataset.get('root') or '').expanduser()
        path = root / (dataset.get('ann_file') or '')
        if path.is_file():
            hashes[name] = _hash_file(path)
        prefixes = dataset.get('data_prefix') or {}
        if prefixes.get('seg_map_path'):
            folders = [root / prefixes[k] for k in ('img_path', 'seg_map_path') if prefixes.get(k)]
            hashes[f'{name}.label_maps'] = _hash_folders(folders)
        # Where the classes of images are the names of their folders.
        if dataset.get('root') and not dataset.get('ann_file'):
            hashes[f'{name}.images'] = _hash_folders([root / (dataset.get('split') or '')])
        for key in ('images', 'labels'):
            array = _array_file(dataset.get(key))
            if array is not None:
                hashes[f'{name}.{key}'] = _hash_file(array)
    return hashes


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:  # piece by piece: an array may be larger than the memory
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _hash_folders(folders: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(p for p in folder.rglob('*') if p.is_file()):
            digest.update(f'{file.relative_to(folder).as_posix()} {file.stat().st_size};'.encode())
    return digest.hexdigest()


def _array_file(value: Any) -> Path | None:
    """The file of an array, which may be one of several in it: ``'file.npz:x_train'``."""
    text = str(value)
    path = Path(text.rpartition(':')[0] if '.npz:' in text else text).expanduser()
    return path if path.is_file() else None


def _max_epochs(config: Config) -> int | None:
    """Length of the training in epochs; None in a loop over iterations."""
    return None if 'max_iters' in config.train_cfg else config.train_cfg.get('max_epochs')


def _short(path: str) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path) if os.path.isabs(path) else path
