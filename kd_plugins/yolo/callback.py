"""The Ultralytics callback that distils: a config and five event handlers."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kd_plugins.distiller import (
    Session,
    build_terms,
    find_module,
    images_of,
    resolver_of,
    summary,
    untouched_rng,
)
from kd_plugins.distiller.ending import write_text
from kd_plugins.distiller.history import History
from kd_plugins.distiller.scoring import TeacherScore, best_of, images_wanted
from kd_plugins.errors import DistillError, check_keys
from kd_plugins.extras import how_to_install
from kd_plugins.predictions import MaskPredictions, readable
from kd_plugins.teachers import ULTRALYTICS, find_source
from kd_plugins.teachers.run import (
    RunOptions,
    load_teachers,
    match_teachers,
    open_session,
    score_session,
    score_warnings,
)
from kd_plugins.yolo.ending import ending_of
from kd_plugins.yolo.example import example_batch
from kd_plugins.yolo.heads import head_of, is_end_to_end, refuse_unsupported
from kd_plugins.yolo.host import UltralyticsHost
from kd_plugins.yolo.log import begin_columns
from kd_plugins.yolo.options import DistillOptions
from kd_plugins.yolo.recipe import FILE, write_recipe
from kd_plugins.yolo.run import Run, position_of
from kd_plugins.yolo.scoring import MAIN, UltralyticsScorer
from kd_plugins.yolo.task import CLASSIFICATION, TASKS
from kd_plugins.yolo.teacher import class_count, class_names, find_teacher, input_channels

OLDEST = (8, 4, 140)
EVENTS = (
    'on_pretrain_routine_end',
    'on_train_epoch_start',
    'on_train_batch_start',
    'on_train_epoch_end',
    'on_fit_epoch_end',
    'on_train_end',
    'teardown',
)


class DistillCallback:
    """Distils an Ultralytics model inside its own trainer.

    .. code-block:: python

        from ultralytics import YOLO
        from kd_plugins.yolo import DistillCallback

        model = YOLO('yolo11n.yaml')
        DistillCallback(teacher='yolo11x.pt', cls=1.0, box=1.0).register(model)
        model.train(data='coco.yaml', epochs=100)

    The student's criterion is replaced for the time of the training by one that adds the KD losses, which appear as
    ``kdcls_loss`` and ``kdbox_loss`` in the progress bar and results.csv. Nothing of it is in the saved models. What
    came out stands at the end of the log, and as ``kd_summary.txt`` and ``kd_summary.json`` in the run's folder.

    What is pickled of it is its options, so that Ultralytics' processes on several GPUs can receive it.

    Args:
        teacher: The teacher's ``.pt`` file, the name of an official model, or a model of another framework as a mapping
            (see `DistillOptions`); or all options as `DistillOptions`.
        **options: The other options of `DistillOptions`, which see.

    Attributes:
        options: The checked options; files have absolute paths.
        summary: The table that was printed at the start of the training that began last, None before.
        teacher_metric: The teacher's value of the compared metric, of several teachers the best's. None: not measured,
            see ``score_teacher``.

    Raises:
        DistillError: An option is misspelt or cannot be right, or the teacher's file is missing.
    """

    def __init__(self, teacher: Any = None, **options: Any) -> None:
        check_installed()
        if isinstance(teacher, DistillOptions):
            if options:
                raise DistillError(f'Options were given twice: as DistillOptions and as {", ".join(options)}.')
            checked = teacher
        else:
            check_keys(options, DistillOptions.names(), 'DistillCallback')
            given = teacher if teacher is None or isinstance(teacher, Mapping) else _as_path(teacher)
            checked = DistillOptions(given, **options)
        # Absolute: the processes on several GPUs start in another folder.
        self.options = _found(checked)
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        return {'options': self.options.to_dict()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.options = DistillOptions.from_dict(state['options'])
        self._begin()

    def _begin(self) -> None:
        self.teacher_metric: float | None = None
        self._teacher_on = ''
        self.summary: str | None = None
        self._history = History()
        self._runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()

    @property
    def history(self) -> list[dict[str, Any]]:
        """What the training that began last logged, a row per epoch, see `History.rows`.

        ``pandas.DataFrame(callback.history)`` is a table of it. On several GPUs trainings are processes of their own,
        and it stays empty here.
        """
        return self._history.rows

    @property
    def session(self) -> Session | None:
        """The session of the training that began last, between attaching and detaching, else None."""
        runs = list(self._runs.values())
        return runs[-1].session if runs else None

    # ------------------------------------------------------------------ registering
    def register(self, model: Any) -> DistillCallback:
        """Add the callback to a ``YOLO`` model (or a trainer); it stays for further ``train()`` calls.

        Returns:
            Itself.

        Raises:
            DistillError: ``model`` is not an Ultralytics model, has such a callback already, or Ultralytics is too
                old.
        """
        if not hasattr(model, 'add_callback') or not isinstance(getattr(model, 'callbacks', None), Mapping):
            raise DistillError(
                f"register expects the model, YOLO('yolo11n.yaml'), or a trainer, got {type(model).__name__}."
            )
        check_version()
        if registered(model):
            raise DistillError(
                'The model already has a DistillCallback; call its unregister(model) first, or a second teacher would '
                'replace it without a word.'
            )
        for event in EVENTS:
            model.add_callback(event, getattr(self, event))
        if hasattr(model, 'tune'):
            # On this object only: each of its trainings is a process of its own, which gets no callbacks.
            model.tune = functools.partial(self.tune, model)
        return self

    def tune(self, model: Any, use_ray: bool = False, iterations: int = 300, **options: Any) -> Any:
        """Ultralytics' ``model.tune`` with distillation, which a registered model's own ``tune`` is.

        Args:
            model: A ``YOLO`` model.
            use_ray: Must be False.
            iterations: Trainings.
            **options: As for ``model.tune``.

        Returns:
            What that returns.

        Raises:
            DistillError: The distillation would not run, so that no iteration was begun; or no training was distilled.
        """
        from kd_plugins.yolo.tuning import tune

        return tune(self, model, use_ray=use_ray, iterations=iterations, **options)

    def unregister(self, model: Any) -> None:
        """Take the callback off a model again."""
        for event in EVENTS:
            kept = [c for c in model.callbacks.get(event, []) if owner_of(c) is not self]
            model.callbacks[event] = kept
        tune = vars(model).get('tune')
        if owner_of(getattr(tune, 'func', None)) is self:
            del model.tune

    # ------------------------------------------------------------------ events, called by the trainer on every rank
    def on_pretrain_routine_end(self, trainer: Any) -> None:
        """Load the teachers, check that everything fits, print the summary and replace the criterion."""
        self._detach(trainer)
        model = unwrapped(trainer.model)
        student = getattr(model, 'student_model', model)
        refuse_unsupported(student, 'student')
        host = UltralyticsHost(student)
        host.counts = lambda: host.task.image_counts(trainer.train_loader.dataset, class_count(student) or 0)
        options, session, notes = self._open(student, host)
        channels = input_channels(student)
        for teacher in session.teachers.values():
            if teacher.channels is not None and channels not in (teacher.channels, 1):
                raise DistillError(
                    f'The student takes images of {channels} channel(s) and the teacher of {teacher.channels}; train a '
                    'teacher on the same kind of images.'
                )
            host.match_memory_format(teacher)
        refuse_other_tasks(session, host)
        session.check_heads()
        names = class_names(trainer.data.get('names'))
        taught = host.task.trained(trainer.args.classes)
        classes = match_teachers(session, names, options, class_count(student), taught)
        batches = max(len(trainer.train_loader), 1)
        # With a limit of time the number of epochs is found out on the way.
        total = None if trainer.args.time else trainer.epochs
        session.begin_run(position_of(trainer, trainer.start_epoch, batches), total)
        with untouched_rng():
            images, batch = example_batch(trainer, channels, images_of(session.terms.values()))
            rows = session.check(images, batch)
        host.counts = None  # the trainer has no place in copies and pickles of what leads here
        if batch is None:
            notes.append('checked on a grey picture: the validation set gave no item before the run')
        scores: dict[str, TeacherScore] = {}
        if is_main():
            scores, more = self._score(trainer, session, host, options, names)
            notes += more
        self.teacher_metric, self._teacher_on = best_of(scores.values())
        run = Run(session, host)
        run.attach(trainer)
        if is_main():
            text = summary(
                rows,
                session.teachers,
                student=f'{type(student).__name__} ({trainer.args.model})',
                student_parameters=sum(p.numel() for p in student.parameters()),
                classes=classes,
                schedule=session.schedule('epoch', trainer.epochs),
                notes=[*notes, *session.notes, *host.task.notes],
                scores=scores,
            )
            self.summary = text
            logger().info(f'\n{text}\n')
            for sentence in score_warnings(session, scores, classes):
                logger().warning(sentence)
            write_text(trainer.save_dir, text)
            if trainer.resume:
                begin_columns(Path(trainer.csv))
            write_recipe(os.path.join(trainer.save_dir, FILE), self.options, options, session)
        run.batches = batches
        self._runs[trainer] = run
        self._history = session.history

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Tell the schedules where the run is; an epoch that is done again (OOM, NaN recovery) starts anew."""
        run = self._runs.get(trainer)
        if run is not None:
            run.begin_epoch(trainer)

    def on_train_batch_start(self, trainer: Any) -> None:
        """Tell the schedules where the run is."""
        run = self._runs.get(trainer)
        if run is not None:
            released = run.begin_batch(position_of(trainer, trainer.epoch, run.batches, run.batch))
            if released is not None and is_main():
                logger().info(released)
            run.batch += 1

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Keep the adapters; warn when KD was out of proportion for the whole epoch, once per direction."""
        run = self._runs.get(trainer)
        if run is None:
            return
        run.end_epoch(trainer, write=is_main())
        run.session.close_row('epoch', trainer.epoch + 1)
        verdict = run.session.proportion()
        if verdict is not None and is_main():
            logger().warning(f'{verdict} (epoch {trainer.epoch + 1}).')

    def on_fit_epoch_end(self, trainer: Any) -> None:
        """Keep what the validation of the epoch measured; that of the best model at the end is none."""
        run = self._runs.get(trainer)
        if run is None or trainer.fitness is None:
            return
        history = run.session.history
        validated = trainer.args.val or trainer.stop or trainer.epoch + 1 >= trainer.epochs
        if validated and history.at('epoch') == trainer.epoch + 1:
            history.measured(MAIN, float(trainer.fitness))

    def on_train_end(self, trainer: Any) -> None:
        """Say what came out, and when the run was never distilled; not called after a crash."""
        run = self._runs.get(trainer)
        if run is None or not is_main():
            return
        never = run.session.finish()
        if never is not None:
            logger().warning(never)
        ending = ending_of(trainer, run, self.teacher_metric, self._teacher_on)
        ending.write()
        logger().info(f'\n{ending.text()}\n')

    def teardown(self, trainer: Any) -> None:
        """Give the student its criterion back; called after training and after a crash."""
        self._detach(trainer)

    # ------------------------------------------------------------------
    def _detach(self, trainer: Any) -> None:
        run = self._runs.pop(trainer, None)
        if run is not None:
            run.detach()

    @staticmethod
    def _score(
        trainer: Any, session: Session, host: UltralyticsHost, options: RunOptions, names: Sequence[str] | None
    ) -> tuple[dict[str, TeacherScore], list[str]]:
        """Score the teachers on some validation images."""
        loader = trainer.train_loader
        size = getattr(loader, 'batch_size', None) or max(int(trainer.args.batch), 1)
        wanted = images_wanted(options.score_teacher, len(loader) * size * trainer.epochs)
        if not wanted:
            return {}, []
        validates = (
            getattr(trainer, 'validator', None) is not None and getattr(trainer, 'test_loader', None) is not None
        )
        scorer = UltralyticsScorer(trainer, session, host, wanted) if validates else None
        count = class_count(session.student)
        return score_session(session, scorer, names, options, count, started=bool(trainer.start_epoch))

    def _open(self, student: nn.Module, host: UltralyticsHost) -> tuple[RunOptions, Session, list[str]]:
        """Load the teachers, each once; whether masks are taught by default depends on them."""
        head = head_of(student)
        facts = dict(classifier=host.task is CLASSIFICATION, end_to_end=is_end_to_end(head))
        # Before the teachers are loaded: what is misspelt needs no minute to be found.
        early = self.options.expand(**facts, masks=readable(head, MaskPredictions))
        build_terms(early.terms, resolver_of(early.imports))
        teachers, notes = load_teachers(early.teachers, student, host, ULTRALYTICS)
        masks = readable(head, MaskPredictions) and all(
            readable(find_module(t.model, t.head, 'teacher'), MaskPredictions) for t in teachers.values()
        )
        branches = all(t.kind == 'ultralytics' and is_end_to_end(head_of(t.model)) for t in teachers.values())
        options = self.options.expand(**facts, masks=masks, teacher_end_to_end=branches)
        return options, open_session(student, teachers, options, host), notes


def _as_path(teacher: Any) -> str:
    # Of an object it says what to write instead.
    return os.fspath(teacher) if isinstance(teacher, (str, os.PathLike)) else find_teacher(teacher)


def _found(options: DistillOptions) -> DistillOptions:
    """The same options with absolute paths of the teachers' files.

    Raises:
        DistillError: A file is missing.
    """

    def found(name: str, source: dict[str, Any]) -> Any:
        given = options.teacher if not name else options.teachers[name]
        checked = find_source(source)
        if not isinstance(given, Mapping):
            # A bare file stays one.
            return next(checked[key] for key, value in source.items() if value == given)
        if set(given) == {'ultralytics'}:
            return checked['ultralytics']
        # What was written beside the teacher stays there.
        return {k: v for k, v in checked.items() if k in given}

    sources = {name: found(name, source) for name, source in options.sources().items()}
    return options.replace(teacher=sources['']) if options.teachers is None else options.replace(teachers=sources)


def refuse_other_tasks(session: Session, host: UltralyticsHost) -> None:
    """Refuse that the classes of images are taught to a detector or the other way round; features may be.

    Raises:
        DistillError: A term compares what a teacher predicts, which its student does not.
    """
    for term in (one for whole in session.terms.values() for one in whole.each):
        teacher = session.teachers[term.teacher.owner]
        if term.consumes == 'features' or term.teacher.module != teacher.head:
            continue
        head = find_module(teacher.model, teacher.head, 'teacher')
        theirs = next((task for task in TASKS if readable(head, task.form)), host.task)
        if theirs is not host.task:
            raise DistillError(
                f'The student is a {host.task.model} and the teacher a {theirs.model}: a teacher must do what its '
                'student does (detect, segment, pose and obb count as detectors), or teach features only.'
            )


def check_installed() -> None:
    """Refuse an environment without Ultralytics, before anything is asked of it; nothing is imported.

    Raises:
        DistillError: It is not there.
    """
    if importlib.util.find_spec('ultralytics') is None:
        raise DistillError(f'Ultralytics is not installed; {how_to_install("yolo")}.')


def check_version() -> None:
    """Refuse an Ultralytics whose structure is not the one that this package was written for.

    Raises:
        DistillError: It is too old: before 8.4.140, processes on several GPUs did not receive callbacks, and a run
            would silently not be distilled.
    """
    check_installed()
    from ultralytics import __version__

    if version_tuple(__version__) < OLDEST:
        raise DistillError(
            f'ultralytics {__version__} is too old: before 8.4.140 the processes of a multi-GPU run do not receive '
            "callbacks and would train without KD; pip install 'ultralytics>=8.4.140,<8.5'."
        )


def version_tuple(text: str) -> tuple[int, ...]:
    """``'8.4.140'`` as numbers; whatever follows them is ignored."""
    numbers = []
    for part in text.split('.')[:3]:
        digits = ''.join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def registered(model: Any) -> list[DistillCallback]:
    """The distillations that a model or trainer has."""
    owners = (owner_of(c) for handlers in model.callbacks.values() for c in handlers)
    return list({id(o): o for o in owners if isinstance(o, DistillCallback)}.values())


def owner_of(callback: Any) -> Any:
    """The object a bound method belongs to."""
    return getattr(callback, '__self__', None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and ``torch.compile``."""
    from ultralytics.utils.torch_utils import unwrap_model

    return unwrap_model(model)


def logger() -> Any:
    """Ultralytics' logger."""
    from ultralytics.utils import LOGGER

    return LOGGER


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ultralytics' logger says nothing but errors."""
    level = logger().level
    logger().setLevel('ERROR')
    try:
        yield
    finally:
        logger().setLevel(level)


def is_main() -> bool:
    """Whether this process logs: the only one, or rank 0."""
    from ultralytics.utils import RANK

    return RANK in (-1, 0)
