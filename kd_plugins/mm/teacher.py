"""Building and loading a teacher from an MM config and a checkpoint."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS
from torch import nn

from kd_plugins.distiller import untouched_rng
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.errors import DistillError, check_keys, shown
from kd_plugins.mm.configs import load_config, missing, plain_model, without_pretrained
from kd_plugins.mm.forward import openmmlab_tap, run_modules
from kd_plugins.mm.inputs import TeacherInputs, teacher_format
from kd_plugins.mm.task import task_of
from kd_plugins.teachers import (
    FrozenTeacher,
    Padding,
    PixelFormat,
    Resized,
    check_prefix,
    find_weights,
    load_checkpoint,
    load_strictly,
    match_names,
    unfilled,
)

TEACHER_KEYS = ('config', 'checkpoint', 'checkpoint_prefix', 'classes', 'allow_missing', 'allow_unexpected')
TEACHER_KEYS += ('input_size', 'input_scale', 'pixel_format')
#: Pixels: less is one cell of most networks' coarsest map, so nothing that could be taught.
MIN_SIDE = 32
#: Where models of the MM family have what predicts.
HEADS = ('bbox_head', 'decode_head', 'logits')


def build_architecture(cfg: Mapping[str, Any]) -> tuple[nn.Module, Config]:
    """Build a teacher's network with random weights, leaving random generators untouched.

    Args:
        cfg: The ``teacher`` mapping.

    Returns:
        The model in evaluation mode and its whole config.

    Raises:
        DistillError: The mapping is misspelt or the config cannot be built.
    """
    if not isinstance(cfg, Mapping):
        hint = '; a classifier of your own is dict(module=...)' if isinstance(cfg, nn.Module) else ''
        raise DistillError(f"teacher must be dict(config='...', checkpoint='...'), got {shown(cfg)}{hint}.")
    check_keys(cfg, TEACHER_KEYS, 'teacher')
    if not cfg.get('config'):
        raise DistillError("teacher needs 'config': the config file the teacher was trained with.")
    config = load_config(cfg['config'])
    # Heads write into the config they are built from.
    model_cfg = without_pretrained(plain_model(copy.deepcopy(config.model)))
    if config.get('data_preprocessor'):
        # As the Runner does.
        model_cfg.setdefault('data_preprocessor', copy.deepcopy(config.data_preprocessor))
    name = config_name(cfg)
    with untouched_rng(), MODELS.switch_scope_and_registry(config.get('default_scope', 'mmengine')) as registry:
        try:
            model = registry.build(model_cfg)
        except Exception as error:
            title = f'the teacher of {name}' if isinstance(cfg['config'], str) else 'the config'
            raise missing(error, title, config.get('default_scope')) or DistillError(
                f'The teacher of {name} cannot be built: {type(error).__name__}: {error}'
            ) from error
        # SyncBN has no forward on the CPU and nothing to synchronise in evaluation.
        model = revert_sync_batchnorm(model)
    return model.eval(), config


def build_teacher(cfg: Mapping[str, Any], student: PixelFormat) -> tuple[Teacher, list[str]]:
    """Build and completely load a teacher.

    Args:
        cfg: ``dict(config=, checkpoint=, checkpoint_prefix=None, classes=None, allow_missing=(), allow_unexpected=(),
            input_size=None, input_scale=None, pixel_format=None)``, or the ``teacher`` of another framework, e.g.
            ``dict(ultralytics='x.pt')``.
        student: The student, whose ``data_preprocessor`` says how its inputs are normalised; or the format itself.
        pixels: The format of the student's batches, where it is known better.

    Returns:
        The teacher and notes for the summary.

    Raises:
        DistillError: Something is missing, misspelt, damaged or does not fit.
    """
    if isinstance(cfg, Mapping) and not cfg.get('checkpoint'):
        check_keys(cfg, TEACHER_KEYS, 'teacher')
        raise DistillError("teacher needs 'checkpoint': a teacher with random weights would teach noise.")
    # What may be missing in the file is as it was built.
    with nullcontext() if cfg.get('allow_missing') else unfilled():
        model, config = build_architecture(cfg)
    with untouched_rng():
        meta, notes = load_model(model, cfg)
    theirs, channels = teacher_format(model, config, student, cfg.get('pixel_format'))
    inputs = teacher_inputs(cfg, student, theirs, own_size(model), channels)
    teacher = FrozenTeacher(
        model,
        run_modules,
        inputs,
        name=config_name(cfg),
        checkpoint=os.fspath(cfg['checkpoint']),
        normalization=inputs.description,
        classes=teacher_classes(cfg, model, config, meta),
        num_classes=num_classes(model),
        head=task_of(model).head,
        resolve=openmmlab_tap,
        kind='config',
        channels=channels,
        padding=teacher_padding(student, theirs, inputs),
    )
    return teacher, notes


def load_model(model: nn.Module, cfg: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """Load the weights of a built teacher completely.

    Args:
        model: The model.
        cfg: The ``teacher`` mapping.

    Returns:
        What else the file says (``meta``), and notes for the summary.

    Raises:
        DistillError: The file is missing or damaged, or does not fit.
    """
    prefix, allowed = cfg.get('checkpoint_prefix'), _names(cfg, 'allow_unexpected')
    check_prefix(prefix)
    content = load_checkpoint(cfg['checkpoint'])
    source = os.fspath(cfg['checkpoint'])
    # A classifier's checkpoints are those of the network in it.
    net = getattr(model, 'weights_of', model)
    weights = match_names(net, find_weights(content, source, prefix=prefix), source, ignore=allowed)
    report = load_strictly(net, weights.state, source, _names(cfg, 'allow_missing'), allowed)
    return weights.meta, [*weights.notes, *report.notes()]


def teacher_inputs(
    cfg: Mapping[str, Any],
    student: PixelFormat,
    teacher: PixelFormat,
    own: tuple[int, int] | None = None,
    channels: int | None = None,
) -> TeacherInputs | Resized:
    """What turns the student's batch into the teacher's: another normalisation, and another resolution if asked for.

    Args:
        cfg: The ``teacher`` mapping.
        student: What the student is given.
        teacher: What the teacher was given.
        own: The size that the teacher was made for, where it was made for one.
        channels: How many the teacher takes, None when unknown.

    Raises:
        DistillError: ``input_size`` or ``input_scale`` is no size or factor, or both are given.
    """
    inputs = TeacherInputs(student, teacher, channels)
    size, scale = cfg.get('input_size'), cfg.get('input_scale')
    if size is None and scale is None:
        return inputs if own in (None, student.size) else Resized(inputs, own, 'bicubic')
    if size is not None and scale is not None:
        raise DistillError('teacher.input_size and teacher.input_scale exclude each other; give one.')
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 1 / 16 <= scale <= 16:
            raise DistillError(f'teacher.input_scale must be a factor from 1/16 to 16, e.g. 2.0, got {scale!r}.')
        return Resized(inputs, float(scale))
    sides = [size, size] if isinstance(size, int) and not isinstance(size, bool) else size
    if (
        not isinstance(sides, (list, tuple))
        or len(sides) != 2
        or any(isinstance(s, bool) or not isinstance(s, int) or s < MIN_SIDE for s in sides)
    ):
        raise DistillError(
            f'teacher.input_size must be pixels or (height, width), each at least {MIN_SIDE}, e.g. (512, 1024), got '
            f'{size!r}.'
        )
    return Resized(inputs, (sides[0], sides[1]))


def teacher_padding(student: PixelFormat, teacher: PixelFormat, inputs: TeacherInputs | Resized) -> Padding | None:
    """What pads the teacher's batch to the multiples that it was trained on, where the student's need not be any."""
    fits = student.divisor % teacher.divisor == 0 and not isinstance(inputs, Resized)
    return None if fits else Padding(teacher.divisor, teacher.pad)


def config_name(cfg: Mapping[str, Any]) -> str:
    """How the summary and errors call a teacher."""
    spec = cfg['config']
    return spec if isinstance(spec, str) else f'(a {type(spec).__name__})'


def _names(cfg: Mapping[str, Any], key: str) -> Sequence[str]:
    value = cfg.get(key) or ()
    if isinstance(value, str) or not all(isinstance(v, str) for v in value):
        raise DistillError(f'teacher.{key} must be a list of key or module names, got {value!r}.')
    return tuple(value)


def teacher_classes(
    cfg: Mapping[str, Any], model: nn.Module, config: Config, meta: Mapping[str, Any]
) -> tuple[str, ...] | None:
    """Names of the teacher's classes: as given, else from its checkpoint, else from its config's data set.

    Names whose number is not the number of classes the teacher's head has are ignored (a config whose data set was
    never adapted), unless they were given explicitly.

    Raises:
        DistillError: Explicit names do not fit the head.
    """
    number = num_classes(model)
    given = cfg.get('classes')
    if given is not None:
        if isinstance(given, str) or not all(isinstance(c, str) for c in given):
            raise DistillError(f'teacher.classes must be a list of names, got {given!r}.')
        if number is not None and len(given) != number:
            raise DistillError(f'teacher.classes has {len(given)} names but the teacher predicts {number} classes.')
        return tuple(given)
    data = meta.get('dataset_meta') if isinstance(meta, Mapping) else None
    stored = [m.get(k) for m in (data, meta) if isinstance(m, Mapping) for k in ('classes', 'CLASSES')]
    for names in (*stored, dataset_classes(config)):
        if names and not isinstance(names, str) and (number is None or len(names) == number):
            return tuple(str(n) for n in names)
    return None


def own_size(model: Any) -> tuple[int, int] | None:
    """``(height, width)`` of all images that a model is given; None: batches have any size."""
    return task_of(model).size(model)


def num_classes(model: nn.Module) -> int | None:
    """Number of classes a model's head predicts, when it says so."""
    for name in (*HEADS, 'head'):
        head = getattr(model, name, None)
        if isinstance(head, nn.ModuleList) and len(head):
            head = head[-1]
        number = getattr(head, 'num_classes', None)
        if isinstance(number, int):
            return number
    return None


def dataset_classes(config: Config) -> Sequence[str] | None:
    """Class names of a config's training data set, without building it."""
    dataset = config.get('train_dataloader', {}).get('dataset') if config.get('train_dataloader') else None
    while isinstance(dataset, Mapping):
        names = (dataset.get('metainfo') or {}).get('classes') or dataset.get('classes')
        if names and not isinstance(names, str):
            return names
        inner = dataset.get('dataset') or (dataset.get('datasets') or [None])[0]
        if inner is None:
            break
        dataset = inner
    if not isinstance(dataset, Mapping):
        return None
    with DATASETS.switch_scope_and_registry(config.get('default_scope', 'mmengine')) as registry:
        kind = dataset.get('type')
        kind = registry.get(kind) if isinstance(kind, str) else kind
    return getattr(kind, 'METAINFO', {}).get('classes') if inspect.isclass(kind) else None
