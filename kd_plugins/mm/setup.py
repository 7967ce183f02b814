"""From the ``distill`` options of a config to a running distiller on an MM model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.registry import MODELS
from mmengine.runner import IterBasedTrainLoop
from torch import nn

from kd_plugins.classification.sample import class_labels
from kd_plugins.distiller import AdapterBank, CannotRunError, Distiller, Tap, build_terms, find_module, untouched_rng
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.distiller.summary import Row
from kd_plugins.errors import DistillError, check_keys
from kd_plugins.mm.forward import run_modules, settle
from kd_plugins.mm.inputs import normalize, pixel_format
from kd_plugins.mm.targets import labels
from kd_plugins.mm.teacher import build_untrained, is_classifier, num_classes
from kd_plugins.predictions import ClassPredictions, readable

DISTILL_KEYS = ('teacher', 'terms', 'start', 'stop', 'alpha')

#: Pixels of the start-up dry run: their mean, and the range of the noise that keeps the maps from being constant.
GREY, NOISE = 114.0, 20.0
#: Side of the square image of the start-up dry run, in pixels: every pyramid up to stride 128 has a cell.
DRY_RUN_SIZE = 256


def find_in_registries(name: str) -> Callable[..., nn.Module] | None:
    """A user's loss or adapter from MMEngine's registries, in the scope of the running config; None if unknown."""
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry.get(name)


def check_options(distill: Any) -> None:
    """Refuse misspelt ``distill`` options.

    Raises:
        DistillError: A key is unknown or missing, or a value cannot be right.
    """
    if not isinstance(distill, Mapping):
        raise DistillError(f'distill must be dict(teacher=..., terms=...), got {distill!r}.')
    check_keys(distill, DISTILL_KEYS, 'distill')
    for key in ('teacher', 'terms'):
        if distill.get(key) is None:
            raise DistillError(f"distill needs 'teacher' and 'terms'; {key!r} is missing.")
    start, stop = distill.get('start', 0), distill.get('stop')
    for key, value in (('start', start), ('stop', stop)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise DistillError(
                f'{key} must be a whole number of epochs (iterations in an IterBasedTrainLoop), got {value!r}.'
            )
    if stop is not None and stop <= (start or 0):
        raise DistillError(f'stop ({stop}) must come after start ({start or 0}).')
    alpha = distill.get('alpha')
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1):
        raise DistillError(
            f"alpha must be a number in [0, 1] (alpha x distillation + (1 - alpha) x the student's own loss), "
            f'got {alpha!r}.'
        )


def build_distiller(
    student: nn.Module, teacher: Teacher, distill: Mapping[str, Any], bank: AdapterBank | None = None, **options: Any
) -> Distiller:
    """Build the engine for a student from the ``distill`` options."""
    check_options(distill)
    terms = build_terms(distill['terms'], find_in_registries)
    for term in terms.values():
        try:
            term.student = settle(student, term.student, 'student')
            if term.teacher == Tap('logits') and not hasattr(teacher.model, 'logits') and is_classifier(student):
                # Another framework's name for it.
                _refuse_others(teacher)
                term.teacher = Tap(teacher.head)
            term.teacher = settle(teacher.model, term.teacher, 'teacher')
            if term.teacher == Tap('logits') and is_classifier(teacher.model) and not is_classifier(student):
                raise DistillError(
                    f'the teacher {teacher.name} is a classifier, whose logits are of whole images, but the student '
                    f"({type(student).__name__}) is none; distil features, e.g. teacher='stages[-1]'."
                )
        except DistillError as error:
            raise DistillError(f'term {term.name!r}: {error}') from error
    return Distiller(
        student,
        teacher,
        terms,
        start=distill.get('start') or 0,
        stop=distill.get('stop'),
        alpha=distill.get('alpha'),
        targets=class_labels if is_classifier(student) else labels,
        resolve=find_in_registries,
        bank=bank,
        **options,
    )


def _refuse_others(teacher: Teacher) -> None:
    if not teacher.head or not readable(find_module(teacher.model, teacher.head, 'teacher'), ClassPredictions):
        raise DistillError(
            f'the teacher {teacher.name} ({type(teacher.model).__name__}) predicts no classes of whole images; take a '
            'classifier, or distil features of it.'
        )


def dry_run(distiller: Distiller, check_values: bool = True, example: Any = None) -> list[Row]:
    """Run student and teacher once on a grey image with some noise and check every term; nothing changes.

    Classifiers run at the size they are trained at.

    Args:
        distiller: The engine.
        check_values: False where the teacher's weights are random, so that NaN or infinity means nothing.
        example: A real batch instead, ``(inputs, data_samples)``.

    Raises:
        DistillError: A tap does not run, shapes do not fit, or the teacher returns NaN.
    """
    if example is not None:
        with untouched_rng():
            return distiller.dry_run(*example, run_modules, check_values=check_values)
    first = next(distiller.student.parameters())
    preprocessor = getattr(distiller.student, 'data_preprocessor', None)
    channels = len(pixel_format(preprocessor).mean)

    def run(size: tuple[int, int]) -> list[Row]:
        # Not white noise: detectors that were trained on pictures answer it with logits in the hundreds, and boxes
        # decoded from those are infinite. Flat grey is what they are padded with.
        pixels = GREY + NOISE * (torch.rand(1, channels, *size, device=first.device) - 0.5)
        image = normalize(pixels, preprocessor).to(first.dtype)
        return distiller.dry_run(image, None, run_modules, check_values=check_values)

    with untouched_rng():
        if is_classifier(distiller.student) and getattr(preprocessor, 'size', None):
            return run(preprocessor.size)
        try:
            return run((DRY_RUN_SIZE, DRY_RUN_SIZE))
        except CannotRunError:
            # Some networks take the size of their training crops only (BEiT's relative positions).
            crop = getattr(preprocessor, 'size', None)
            if not isinstance(crop, (tuple, list)) or len(crop) != 2:
                raise
            return run((int(crop[0]), int(crop[1])))


def build_bank(student: nn.Module, distill: Mapping[str, Any]) -> AdapterBank:
    """Build the adapters that a student's terms need, from the teacher's architecture alone.

    The teacher is built with random weights for its shapes and dropped again; random generators stay as they were.

    Raises:
        DistillError: The options are wrong or the terms do not fit.
    """
    check_options(distill)
    teacher = build_untrained(distill['teacher'], student)
    counts = num_classes(student), teacher.num_classes
    # Which class is which cannot be known here, where there is no data set yet; for shapes any will do.
    classes = None if None in counts or counts[0] == counts[1] else (range(min(counts)), range(min(counts)))
    with untouched_rng():
        distiller = build_distiller(student, teacher, distill, classes=classes)
        dry_run(distiller, check_values=False)
    return distiller.bank


def schedule_text(distiller: Distiller, unit: str, total: int) -> str:
    """When KD is on, in words."""
    last = f'up to {unit} {distiller.stop}' if distiller.stop is not None else 'to the end'
    balance = ''
    if distiller.alpha is not None:
        balance = f", {distiller.alpha:g} x distillation + {1 - distiller.alpha:g} x the student's own loss"
    return f'from {unit} {distiller.start} {last} (of {total}){balance}'


def unit_of(runner: Any) -> tuple[str, int, int]:
    """What ``start`` and ``stop`` are counted in: ``('epoch', done, total)``, or iterations in an iteration loop."""
    loop = runner.train_loop
    if isinstance(loop, IterBasedTrainLoop):
        return 'iteration', loop.iter, loop.max_iters
    return 'epoch', loop.epoch, loop.max_epochs
