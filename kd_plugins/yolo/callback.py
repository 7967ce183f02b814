"""The Ultralytics callback that distils: a config and five event handlers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kd_plugins.distiller.summary import summary
from kd_plugins.errors import DistillError, check_keys, nearest
from kd_plugins.predictions import match_classes
from kd_plugins.yolo.criterion import KDCriterion, plain_criterion
from kd_plugins.yolo.heads import BRANCHES, SUPPORTED, head_of
from kd_plugins.yolo.losses import YOLODistiller
from kd_plugins.yolo.options import DistillOptions
from kd_plugins.yolo.recipe import FILE, write_recipe
from kd_plugins.yolo.teacher import build_teacher, class_count, class_names, find_any_teacher, has_masks, input_channels

OLDEST = (8, 4, 140)
EVENTS = ('on_pretrain_routine_end', 'on_train_epoch_start', 'on_train_batch_start', 'on_train_epoch_end', 'teardown')

#: KD over task loss outside of which a whole epoch is reported.
BALANCE = (0.01, 10.0)


class DistillCallback:
    """Distils an Ultralytics model inside its own trainer.

    .. code-block:: python

        from ultralytics import YOLO
        from kd_plugins.yolo import DistillCallback

        model = YOLO('yolo11n.yaml')
        DistillCallback(teacher='yolo11x.pt', cls=1.0, box=1.0).register(model)
        model.train(data='coco.yaml', epochs=100)

    The student's criterion is replaced for the time of the training by one that adds the KD losses, which appear as
    ``kdcls_loss`` and ``kdbox_loss`` in the progress bar and results.csv. Nothing of it is in the saved models.

    What is pickled of it is its options, so that Ultralytics' processes on several GPUs can receive it.

    Args:
        teacher: The teacher's ``.pt`` file, the name of an official model, or a model of another framework as a mapping
            (see `DistillOptions`); or all options as `DistillOptions`.
        **options: The other options of `DistillOptions`, which see.

    Attributes:
        options: The checked options; ``teacher`` is an absolute path.
        distiller: The running distillation between attaching and detaching, else None.

    Raises:
        DistillError: An option is misspelt or cannot be right, or the teacher's file is missing.
    """

    def __init__(self, teacher: Any = None, **options: Any) -> None:
        if isinstance(teacher, DistillOptions):
            if options:
                raise DistillError(f'Options were given twice: as DistillOptions and as {", ".join(options)}.')
            checked = teacher
        else:
            check_keys(options, DistillOptions.names(), 'DistillCallback')
            checked = DistillOptions(find_any_teacher(teacher), **options)
        # Absolute: the processes on several GPUs start in another folder.
        self.options = checked.replace(teacher=find_any_teacher(checked.teacher))
        self._forget()

    def _forget(self) -> None:
        self.distiller: YOLODistiller | None = None
        self._model: nn.Module | None = None
        self._batches, self._batch = 1, 0
        self._reported: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {'options': self.options.to_dict()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.options = DistillOptions.from_dict(state['options'])
        self._forget()

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
        return self

    def unregister(self, model: Any) -> None:
        """Take the callback off a model again."""
        for event in EVENTS:
            kept = [c for c in model.callbacks.get(event, []) if owner_of(c) is not self]
            model.callbacks[event] = kept

    # ------------------------------------------------------------------ events, called by the trainer on every rank
    def on_pretrain_routine_end(self, trainer: Any) -> None:
        """Load the teacher, check that everything fits, print the summary and replace the criterion."""
        self._detach()
        model = unwrapped(trainer.model)
        student = getattr(model, 'student_model', model)
        self._refuse_self_teaching(trainer)
        teacher = build_teacher(
            self.options.teacher,
            branches=BRANCHES if self.options.branch == 'both' else (self.options.branch,),
            feats=self.options.feature is not None,
            masks=has_masks(head_of(student)) and self.options.mask != 0,
            trusted=self.options.trusted,
        )
        channels = input_channels(student), teacher.channels
        if channels[0] != channels[1]:
            raise DistillError(
                f'The student takes images of {channels[0]} channel(s) and the teacher of {channels[1]}; train a '
                'teacher on the same kind of images.'
            )
        names = class_names(trainer.data.get('names'))
        theirs = self.options.classes if self.options.classes is not None else teacher.classes
        classes = pair_classes(names, theirs, self.options.class_map, class_count(student), teacher.num_classes)
        if self.options.start >= trainer.epochs:
            raise DistillError(
                f'start={self.options.start} is not before the end of the run ({trainer.epochs} epochs).'
            )
        distiller = YOLODistiller(student, teacher, self.options, classes)
        first = next(student.parameters())
        side = 2 * max(int(trainer.stride), 32)
        image = torch.full((2, channels[0], side, side), 0.5, device=first.device, dtype=first.dtype)
        rows = distiller.check(image)
        if is_main():
            text = summary(
                rows,
                teacher,
                student=f'{type(student).__name__} ({trainer.args.model})',
                student_parameters=sum(p.numel() for p in student.parameters()),
                classes=_classes_text(names, theirs, classes),
                schedule=self._schedule_text(trainer.epochs),
                notes=self._notes(distiller),
            )
            logger().info(f'\n{text}\n')
            self._write_yaml(trainer)
        self.distiller = distiller
        self._batches = max(len(trainer.train_loader), 1)
        self._attach(student)

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Tell the schedules where the run is; an epoch that is done again (OOM, NaN recovery) starts anew."""
        self._batch, self._batches = 0, max(len(trainer.train_loader), 1)
        if self.distiller is not None:
            self.distiller.epoch = trainer.epoch
            self.distiller.balance()

    def on_train_batch_start(self, trainer: Any) -> None:
        """Tell the schedules where the run is."""
        if self.distiller is not None:
            done = trainer.epoch + min(self._batch / self._batches, 1.0)
            self.distiller.progress = min(done / max(trainer.epochs, 1), 1.0)
            self._batch += 1

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Warn when KD was out of proportion for the whole epoch; once per direction."""
        ratio = self.distiller.balance() if self.distiller is not None else None
        if ratio is None or not is_main():
            return
        low, high = BALANCE
        kind = 'high' if ratio > high else 'low' if ratio < low else None
        if kind is None or kind in self._reported:
            return
        self._reported.add(kind)
        if kind == 'high':
            text = f'{ratio:.3g} times the task loss: the labels hardly count; lower cls and box'
        else:
            text = f'{ratio:.2%} of the task loss: it hardly changes the student; raise cls and box'
        logger().warning(f'KD was {text} (epoch {trainer.epoch + 1}).')

    def teardown(self, trainer: Any) -> None:
        """Give the student its criterion back; called after training and after a crash."""
        self._detach()

    # ------------------------------------------------------------------ attaching
    def _attach(self, student: nn.Module) -> None:
        # A resumed run already has one, whose decay has advanced.
        criterion = plain_criterion(getattr(student, 'criterion', None))
        if criterion is None:
            criterion = student.init_criterion()
        if isinstance(criterion, nn.Module):
            raise DistillError(
                f'The criterion {type(criterion).__name__} is a module, which this callback cannot wrap; supported '
                f'are {SUPPORTED} with the criteria of Ultralytics.'
            )
        student.criterion = KDCriterion(criterion, self.distiller.add)
        self._model = student

    def _detach(self) -> None:
        if self._model is not None:
            self._model.criterion = plain_criterion(getattr(self._model, 'criterion', None))
        self._forget()

    def _refuse_self_teaching(self, trainer: Any) -> None:
        start = str(trainer.args.model)
        if (
            not trainer.resume
            and isinstance(self.options.teacher, str)
            and os.path.isfile(start)
            and os.path.realpath(start) == os.path.realpath(self.options.teacher)
        ):
            raise DistillError(
                f"The student starts from the teacher's own file {start!r}: they would be equal and nothing would be "
                'learned; give another model or another teacher.'
            )

    def _write_yaml(self, trainer: Any) -> None:
        write_recipe(os.path.join(trainer.save_dir, FILE), self.options)

    def _schedule_text(self, epochs: int) -> str:
        last = f'up to epoch {self.options.stop}' if self.options.stop is not None else 'to the end'
        return f'from epoch {self.options.start} {last} (of {epochs})'

    def _notes(self, distiller: YOLODistiller) -> list[str]:
        notes = []
        if all(str(t.weight) == '0' for t in distiller.terms):
            notes.append('all weights are 0: the run is the plain one')
        if distiller.family == 'dense':
            notes.append('losses are multiplied by the batch size, as the task loss is')
        return notes


def check_version() -> None:
    """Refuse an Ultralytics whose structure is not the one that this package was written for.

    Raises:
        DistillError: It is too old: before 8.4.140, processes on several GPUs did not receive callbacks, and a run
            would silently not be distilled.
    """
    try:
        from ultralytics import __version__
    except ImportError as error:
        raise DistillError("Ultralytics is not installed: pip install 'kd-plugins[yolo]'.") from error
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


def pair_classes(
    student: Sequence[str] | None,
    teacher: Sequence[str] | None,
    class_map: Mapping[str, str] | None,
    student_count: int | None,
    teacher_count: int | None,
) -> tuple[list[int], list[int]] | None:
    """Which class of the student is which of the teacher, by name; None when the sets are equal.

    Args:
        student: Names of the student's classes.
        teacher: Names of the teacher's classes.
        class_map: ``{student name: teacher name}`` where the names differ.
        student_count: Classes the student's head predicts.
        teacher_count: Classes the teacher's head predicts.

    Raises:
        DistillError: The map names classes that do not exist, or no class is common to both.
    """
    mapped = student
    if class_map:
        for side, known, given in (('student', student, class_map), ('teacher', teacher, class_map.values())):
            for name in given:
                if name not in (known or ()):
                    raise DistillError(f'class_map: the {side} has no class {name!r}; {nearest(name, known or ())}')
        mapped = [class_map.get(n, n) for n in student or ()]
    try:
        return match_classes(mapped, teacher, student_count=student_count, teacher_count=teacher_count)
    except DistillError as error:
        text = str(error).replace('Write classes=[...] in teacher if only the names differ.', '').strip()
        raise DistillError(
            f'{text} If they mean the same under other names, write class_map={{student name: teacher name}}, or '
            "classes=[...] with the names of the teacher's outputs."
        ) from error


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


def _classes_text(student: Any, teacher: Any, classes: Any) -> str:
    if classes is not None:
        return f'{len(classes[0])} of {len(student)} student classes taught by name (teacher knows {len(teacher)})'
    if student is None or teacher is None:
        return 'same number of classes, names of one side unknown: assumed to be in the same order'
    return f'the same {len(student)} classes'
