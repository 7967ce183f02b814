"""What the networks of the MM family are given for pixels, and how one network's batch becomes another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn

from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import DistillError
from kd_plugins.mm.data import pipelines
from kd_plugins.mm.measure import UnreadableError, build_steps, measure
from kd_plugins.teachers import PixelFormat, Renormalize

#: Where configs have their data sets; those of older versions in ``data``.
_TRAINED = ('train_dataloader.dataset', 'data.train', 'train_pipeline')
_TESTED = ('test_dataloader.dataset', 'val_dataloader.dataset', 'data.test', 'data.val', 'test_pipeline')
#: Pixels: sides of the picture that a network is tried on where it has no size of its own.
_SIDE = 256
#: Grey levels: no batch of pictures is that dark throughout.
_DARK = 8.0


class TeacherInputs(Renormalize):
    """Re-normalises a processed batch from the student's statistics to the teacher's.

    Args:
        student: The student's ``data_preprocessor`` (of MMEngine's kind), or the format of its batches.
        teacher: The teacher's ``data_preprocessor``, or the format of its batches.
        channels: How many channels the teacher takes, see `Renormalize`.
    """

    def __init__(
        self,
        student: nn.Module | PixelFormat | None,
        teacher: nn.Module | PixelFormat | None,
        channels: int | None = None,
    ) -> None:
        ours, theirs = (f if isinstance(f, PixelFormat) else pixel_format(f) for f in (student, teacher))
        super().__init__(ours, theirs, channels)


def normalize(pixels: Tensor, preprocessor: nn.Module | None) -> Tensor:
    """Pixels (0 to 255, in the network's channel order) as a data preprocessor would hand them to the network."""
    known = pixel_format(preprocessor)
    mean, std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (known.mean, known.std))
    return (pixels - mean) / std


def student_format(
    model: nn.Module, found: Sequence[Sequence[Any]] = (), channels: int | None = None, given: Any = None
) -> PixelFormat:
    """What the student's network is given.

    Args:
        model: The student.
        found: The transforms of the running data set, see `kd_plugins.mm.data.pipelines`.
        channels: Of the images that its data set hands out. Default: what its data preprocessor takes.
        given: What the user says it is, ``dict(mean=, std=, rgb=, pad=)``; then nothing is measured.

    Raises:
        DistillError: It cannot be established: it differs between the data sets of the run, for one.
    """
    preprocessor = getattr(model, 'data_preprocessor', None)
    if given is not None:
        return _declared(given, 'pixel_format', preprocessor)
    try:
        known = _one_format([_format(preprocessor, steps, channels) for steps in found or [()]])
    except UnreadableError as error:
        raise DistillError(
            f"What the student's network is given for pixels cannot be established: {error}; write pixel_format="
            'dict(mean=(...), std=(...), rgb=True) beside teacher and terms.'
        ) from error
    assert known is not None
    return known


def _one_format(formats: Sequence[PixelFormat]) -> PixelFormat | None:
    other = next((f for f in formats if f != formats[0]), None)
    if other is not None:
        raise UnreadableError(f'its data sets normalise their images in different ways, {formats[0]} and {other}')
    return formats[0] if formats else None


def teacher_format(
    model: nn.Module, config: Config, student: PixelFormat | None = None, given: Any = None
) -> tuple[PixelFormat, int | None]:
    """What a teacher's network was given when it was trained, and how many channels it takes.

    Args:
        model: The teacher, as it was built.
        config: Its whole config.
        student: The format of the batches it will get.
        given: What the user says it is, ``dict(mean=, std=, rgb=, pad=)``; then nothing is measured.

    Returns:
        The format, and the number of channels, None when unknown.

    Raises:
        DistillError: It cannot be established.
    """
    preprocessor = getattr(model, 'data_preprocessor', None)
    ours = None if student is None else len(student.mean)
    channels = network_channels(model, [ours, 3, 1])
    if given is not None:
        return _declared(given, 'teacher.pixel_format', preprocessor), channels
    try:
        found = {place: _config_steps(config, place) for place in (_TRAINED, _TESTED)}
        formats = {p: _one_format([_format(preprocessor, s, channels) for s in steps]) for p, steps in found.items()}
        known = {f for f in formats.values() if f is not None}
        if len(known) > 1:
            raise UnreadableError(
                f'its pipelines normalise in different ways, for training {formats[_TRAINED]}, for testing '
                f'{formats[_TESTED]}'
            )
        if not known and type(preprocessor) is BaseDataPreprocessor:
            # What a model gets that is told of none.
            raise UnreadableError('it has neither a data_preprocessor nor a pipeline')
        return known.pop() if known else _format(preprocessor, (), channels), channels
    except UnreadableError as error:
        raise DistillError(
            f'What the teacher was given for pixels cannot be established from its config: {error}; write '
            'pixel_format=dict(mean=(...), std=(...), rgb=True) in teacher.'
        ) from error


def _config_steps(config: Config, places: Sequence[str]) -> list[list[Any]]:
    """The transforms of the first of these places that a config has: one list for every data set in it."""
    for place in places:
        value: Any = config
        for key in place.split('.'):
            value = (value.get(key) if hasattr(value, 'get') else None) or None
        if value is not None:
            found = [value] if place.endswith('pipeline') else pipelines(value)
            scope = config.get('default_scope') or 'mmengine'
            return [build_steps(pipeline, scope) for pipeline in found if pipeline]
    return []


def network_channels(model: nn.Module, candidates: Sequence[int | None]) -> int | None:
    """How many channels a network's first layer takes, found by trying.

    Args:
        model: Any model of the MM family.
        candidates: Numbers to try in this order.

    Returns:
        The first that fits, None when none does.
    """
    size = getattr(getattr(model, 'data_preprocessor', None), 'size', None)
    sides = size if isinstance(size, (tuple, list)) else (_SIDE, _SIDE)
    layers = [m for m in model.modules() if isinstance(getattr(m, 'weight', None), Tensor) and m.weight.dim() > 1]
    like = next(model.parameters(), torch.empty(0))
    handles = [layer.register_forward_hook(_stop) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for count in dict.fromkeys(c for c in candidates if c):
            try:
                with torch.no_grad(), untouched_rng():
                    (getattr(model, 'extract_feat', None) or model)(like.new_zeros(1, count, *sides))
            except _StopError:
                return count
            except Exception:
                continue
            return count
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return None


class _StopError(Exception):
    """The first layer has run."""


def _stop(*_: Any) -> None:
    raise _StopError


def refuse_other_units(inputs: Tensor, student: PixelFormat) -> None:
    """Refuse a batch that, brought back to pixels, holds none: something normalises it that could not be seen.

    For runs with a teacher that needs another format.

    Args:
        inputs: ``(B, C, H, W)`` a real batch as the student is given it.
        student: Its format.

    Raises:
        DistillError: All values are within a few grey levels.
    """
    if inputs.shape[1] != 3:
        return
    mean, std = (inputs.new_tensor(v).view(1, -1, 1, 1) for v in (student.mean, student.std))
    pixels = inputs * std + mean
    low, high = pixels.min().item(), pixels.max().item()
    if low < high and max(-low, high) < _DARK:
        raise DistillError(
            f"The student's images, brought back to pixels ({student}), lie between {low:.2f} and {high:.2f} instead "
            'of 0 and 255: its data set scales them in a way that cannot be seen; write pixel_format=dict(mean=(...), '
            'std=(...), rgb=True) beside teacher and terms.'
        )


def pixel_format(preprocessor: nn.Module | None) -> PixelFormat:
    """What a data preprocessor makes of pixels, whatever pipeline is before it.

    Raises:
        DistillError: It cannot be established.
    """
    try:
        return _format(preprocessor, (), None)
    except UnreadableError as error:
        raise DistillError(
            f'What a network is given for pixels cannot be established: {error}; write pixel_format=dict(mean=(...), '
            'std=(...), rgb=True).'
        ) from error


def _format(preprocessor: nn.Module | None, steps: Sequence[Any], channels: int | None) -> PixelFormat:
    # Whoever knows what its batches look like says so.
    declared = getattr(preprocessor, 'pixel_format', None)
    if declared is not None:
        return _declared(declared, 'data_preprocessor.pixel_format', preprocessor)
    errors = []
    for count in dict.fromkeys(c for c in (channels, 3, 1) if c):
        try:
            found = measure(preprocessor, steps, count)
        except UnreadableError as error:
            errors.append(error)
            continue
        if channels in (None, len(found.mean)):
            return found
    raise errors[0] if errors else UnreadableError(f'its network takes {channels} channels, but its images have others')


def _declared(options: Any, where: str, preprocessor: nn.Module | None) -> PixelFormat:
    """A format that somebody wrote down; how batches are padded need not be repeated."""
    divisor = getattr(preprocessor, 'pad_size_divisor', None)
    known = PixelFormat.from_options(options, where)
    return replace(known, divisor=divisor) if isinstance(divisor, int) and divisor > 0 else known
