"""What all classifiers as teachers have in common: their options, their pixels and their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_plugins.distiller import untouched_rng
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.errors import DistillError, check_keys, in_words
from kd_plugins.teachers import (
    FrozenTeacher,
    PixelFormat,
    Renormalize,
    Resized,
    check_prefix,
    find_file,
    find_weights,
    load_checkpoint,
    load_strictly,
    match_names,
    unfilled,
)
from kd_plugins.teachers.names import Convert
from kd_plugins.teachers.network import ClassifierNetwork, DataConfig, image_size, per_channel, whole_number
from kd_plugins.teachers.taps import classifier_tap

#: Options of every classifier as a teacher, see `find_options`.
OPTIONS = (
    'checkpoint', 'checkpoint_prefix', 'num_classes', 'classes', 'input_size', 'mean', 'std', 'in_chans', 'multi_label',
)  # fmt: skip


def find_options(cfg: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Check the options that all classifiers share; files get absolute paths.

    - ``checkpoint``: its weights, which are loaded completely or refused;
    - ``checkpoint_prefix``: what the names of its weights begin with in a file of several models, e.g. ``'teacher.'``;
    - ``num_classes``: how many classes it predicts. Default: as many as the checkpoint's classifier has;
    - ``classes``: their names, in order;
    - ``input_size``: pixels or ``(height, width)`` that it is given, whatever the student sees;
    - ``mean``, ``std``: per channel, of RGB pixels in [0, 1];
    - ``in_chans``: channels of its images. Default: 3. A student on grey images gives it their copies;
    - ``multi_label``: whether each class is a yes or no (sigmoid). Default: False (softmax).

    Args:
        cfg: The ``teacher`` mapping.
        keys: What this kind of teacher takes besides.

    Raises:
        DistillError: A key is misspelt, a value cannot be right, or the checkpoint is missing.
    """
    check_keys(cfg, (*keys, *OPTIONS), 'teacher')
    for key in ('num_classes', 'in_chans'):
        if cfg.get(key) is not None:
            whole_number(cfg[key], f'teacher.{key}')
    image_size(cfg.get('input_size'), 'teacher.input_size')
    channels = channels_of(cfg)
    for key in ('mean', 'std'):
        value = cfg.get(key)
        if value is not None and not _numbers(value, channels, above_zero=key == 'std'):
            count = 'three numbers' if channels == 3 else f'{channels} number(s)'
            raise DistillError(f'teacher.{key} must be {count}, of pixels in [0, 1], got {value!r}.')
    classes = cfg.get('classes')
    if classes is not None:
        names = isinstance(classes, Sequence) and not isinstance(classes, str)
        if not names or not all(isinstance(c, str) for c in classes):
            raise DistillError(f'teacher.classes must be a list of names, got {classes!r}.')
        if cfg.get('num_classes') is not None:
            _check_count(classes, cfg['num_classes'])
    if not isinstance(cfg.get('multi_label', False), bool):
        raise DistillError(f'teacher.multi_label must be True or False, got {cfg["multi_label"]!r}.')
    check_prefix(cfg.get('checkpoint_prefix'))
    found = dict(cfg)
    if cfg.get('checkpoint'):
        found['checkpoint'] = find_file(cfg['checkpoint'], 'teacher.checkpoint')
    return found


def wanted_classes(cfg: Mapping[str, Any]) -> int | None:
    """How many classes the options speak of, or None when they do not."""
    if cfg.get('num_classes') is not None:
        return cfg['num_classes']
    return None if cfg.get('classes') is None else len(cfg['classes'])


def channels_of(cfg: Mapping[str, Any]) -> int:
    """Channels of the teacher's images."""
    return 3 if cfg.get('in_chans') is None else cfg['in_chans']


def activation(cfg: Mapping[str, Any]) -> str:
    """What turns the teacher's logits into probabilities."""
    return 'sigmoid' if cfg.get('multi_label') else 'softmax'


class Loaded(NamedTuple):
    """A network with its weights.

    Attributes:
        net: The network.
        number: Of classes that it was made for; None: as many as it has of itself.
        classes: Names that the file knows (MMEngine's do), or None.
        notes: For the summary: what of the file was taken.
    """

    net: nn.Module
    number: int | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def load_weights(
    create: Callable[[int | None], nn.Module], cfg: Mapping[str, Any], kind: str, convert: Convert | None = None
) -> Loaded:
    """Create a network and load ``checkpoint`` completely.

    Args:
        create: Makes the network for a number of classes; None: for as many as it has of itself. Where the options name
            no number, it is the file's.
        cfg: The checked options.
        kind: Key of the ``teacher`` mapping, for the message.
        convert: See `match_names`.

    Raises:
        DistillError: Weights are missing, unexpected or of another shape.
    """
    source = cfg['checkpoint']
    weights = find_weights(load_checkpoint(source), source, prefix=cfg.get('checkpoint_prefix'))
    number = wanted_classes(cfg)
    with unfilled():
        net = create(number)
    weights = match_names(net, weights, source, convert=convert)
    if number is None and (number := _stored_classes(net, weights.state)) is not None:
        with unfilled():
            net = create(number)
    report = load_strictly(net, weights.state, source, architecture=f'teacher.{kind}')
    data = weights.meta.get('dataset_meta')
    names = data.get('classes') if isinstance(data, Mapping) else None
    usable = names if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) else None
    return Loaded(net, number, None if usable is None else tuple(usable), (*weights.notes, *report.notes()))


def _stored_classes(net: nn.Module, weights: Mapping[str, Tensor]) -> int | None:
    """How many classes a file's classifier has, when that is all in which the file differs from a network."""
    pairs = [(value.shape, weights[key].shape) for key, value in net.state_dict().items() if key in weights]
    other = [(own, stored) for own, stored in pairs if own != stored]
    same = all(own and stored and own[1:] == stored[1:] for own, stored in other)
    numbers = {(own[:1], stored[:1]) for own, stored in other}
    return other[0][1][0] if same and len(numbers) == 1 else None


def count_classes(net: ClassifierNetwork, size: tuple[int, int], channels: int, where: str) -> int:
    """How many classes a network predicts, found by running it.

    Args:
        net: The network; it is put in evaluation mode.
        size: ``(H, W)`` of the images.
        channels: Their channels.
        where: The option that names the teacher, for the message.

    Raises:
        DistillError: It does not take images, or returns no logits.
    """
    try:
        with untouched_rng(), torch.no_grad():
            # Two: what was traced with one image may take no more.
            return net.eval()(torch.zeros(2, channels, *size)).shape[1]
    except DistillError as error:
        raise DistillError(f'{where}: {error}') from error
    except Exception as error:
        raise DistillError(
            f'{where} cannot be run on two images of {size[0]}x{size[1]} with {channels} channel(s) '
            f'({in_words(error)}); give teacher.input_size=(height, width) and '
            'teacher.in_chans as it was trained.'
        ) from error


def as_teacher(
    net: ClassifierNetwork,
    cfg: Mapping[str, Any],
    student: PixelFormat,
    *,
    kind: str,
    name: str,
    source: str,
    data: DataConfig,
    size: tuple[int, int] | None,
    stored: Sequence[str] | None = None,
) -> Teacher:
    """The teacher of a loaded classifier.

    Args:
        net: The classifier.
        cfg: The checked options.
        student: What the batches look like that it will be given.
        kind: Key of the ``teacher`` mapping.
        name: For the summary.
        source: Where its weights come from.
        data: Normalisation and interpolation where the options name none.
        size: ``(H, W)`` that it is given; None: the student's resolution.
        stored: Class names that its file knows; used when the options name none and the number fits.

    Returns:
        The teacher; its logits are tapped as ``'logits'``.

    Raises:
        DistillError: The number of class names is wrong, or grey pixels would have to be made from coloured ones.
    """
    number = net.logits.num_classes
    classes = cfg.get('classes')
    if classes is not None:
        _check_count(classes, number)
    elif stored is not None and len(stored) == number:
        classes = stored
    channels = channels_of(cfg)
    mean, std = (
        tuple(255 * float(v) for v in cfg[key]) if cfg.get(key) is not None else per_channel(default, channels)
        for key, default in (('mean', data.mean), ('std', data.std))
    )
    renormalize = Renormalize(student, PixelFormat(mean, std, rgb=True), channels=channels)
    inputs: Renormalize | Resized = renormalize
    if size is not None:
        # What timm and torchvision name besides is no mode of `interpolate`.
        mode = data.interpolation if data.interpolation in ('bilinear', 'bicubic') else 'bicubic'
        inputs = Resized(renormalize, size, mode)
    return FrozenTeacher(
        net,
        _run,
        inputs,
        name=name,
        checkpoint=source,
        normalization=inputs.description,
        classes=classes,
        num_classes=number,
        head='logits',
        resolve=classifier_tap,
        kind=kind,
        channels=channels,
    )


def _run(model: nn.Module, inputs: Tensor, samples: Any, modules: Sequence[str]) -> None:
    model(inputs)


def _check_count(classes: Sequence[str], number: int | None) -> None:
    if number is not None and len(classes) != number:
        raise DistillError(f'teacher.classes has {len(classes)} names but the teacher predicts {number} classes.')


def _numbers(value: Any, count: int, above_zero: bool) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != count:
        return False
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    return numbers and all((v > 0 or not above_zero) and v <= 1 for v in value)
