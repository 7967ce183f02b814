"""What a pipeline and a data preprocessor make of pixels, found by giving them pictures of one colour."""

from __future__ import annotations

import copy
import os
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import in_words
from kd_plugins.mm.copies import private_copy
from kd_plugins.teachers import PixelFormat

#: Side of the pictures, in pixels.
SIDE = 32
#: Relative to the range of the results: more is no straight line.
TOLERANCE = 1e-3
#: Of what is computed in float32, relative.
PRECISION = 4e-7
#: Of standard deviations in pixels (0 to 255), from raw ones to those in [0, 1]; twice normalised ones are far outside.
PLAUSIBLE = (0.9, 300.0)
#: Of the range of the colours: what comes out closer than that has been scaled.
NARROW = 1 / 12

_NORMALISES = re.compile('normali[sz]e', re.IGNORECASE)


class UnreadableError(Exception):
    """A format cannot be found out; the text is a clause that says why."""


def measure(preprocessor: nn.Module | None, steps: Sequence[Any] = (), channels: int = 3) -> PixelFormat:
    """The format of what a network is given.

    Every step is given pictures of one colour each. What it does to their colours belongs to the format when it is
    the same every time and a straight line per channel, like normalising; what is random or mixes colours (jitter,
    greyscale, equalising) is augmentation, which changes the picture and not its format. Steps that do not run on a
    bare picture (annotations, several images) change none.

    Args:
        preprocessor: A data preprocessor of MMEngine's kind; None changes nothing.
        steps: Transforms in order; copies of them are run, because some keep what they are given.
        channels: Of the images that are loaded.

    Returns:
        Mean and standard deviation per channel of what comes out, its channel order and its padding.

    Raises:
        UnreadableError: A step normalises in a way that cannot be seen, the preprocessor does not run on a picture,
            what it does is no normalisation, or images are normalised twice.
    """
    given = np.random.RandomState(0).randint(20, 236, (channels + 3, channels)).astype(np.float64)
    with _quiet(), untouched_rng():
        steps = list(_copies(steps))
        rgb = _loads_rgb(steps)
        values, dtype = given, np.dtype(np.uint8)
        for step in steps:
            values, dtype = _through(step, values, dtype)
        made = values if preprocessor is None else _processed(preprocessor, values, dtype)
    whole, before, after = _line(given, made), _line(given, values), _line(values, made)
    if whole is None or before is None or after is None:
        raise UnreadableError(
            f'what its data_preprocessor ({type(preprocessor).__name__}) makes of a picture is no (pixel - mean) / std '
            'per channel'
        )
    source, scale, offset = whole
    deviations = 1 / np.abs(scale)
    twice = all(np.abs(np.abs(line[1]) - 1).max() > TOLERANCE for line in (before, after))
    if twice and not (PLAUSIBLE[0] <= deviations.min() and deviations.max() <= PLAUSIBLE[1]):
        raise UnreadableError('its images are normalised twice, in the pipeline and again in the data_preprocessor')
    first = source[:3].tolist()
    if first == [2, 1, 0]:
        rgb = not rgb
    elif first != sorted(first):
        raise UnreadableError(f'its channels come in the order {source.tolist()} of those of the file')
    size = getattr(preprocessor, 'pad_size_divisor', None)
    return PixelFormat(
        mean=_written(-offset / scale, least=100.0),
        std=_written(1 / scale),
        rgb=rgb and len(source) > 2,
        pad=float(getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0)) or 0),
        divisor=size if isinstance(size, int) and size > 0 else 1,
    )


def picture_size(steps: Sequence[Any]) -> tuple[int, int] | None:
    """``(height, width)`` that a pipeline makes of a common picture, None where it changes nothing.

    Steps that do not run on a bare picture are left out, see `measure`.
    """
    picture = np.full((480, 640, 3), 114, np.uint8)
    size = picture.shape[:2]
    with _quiet(), untouched_rng():
        for step in _copies(steps):
            try:
                picture = _transformed(step, picture)
            except Exception:
                continue
    return None if picture.shape[:2] == size else picture.shape[:2]


def build_steps(pipeline: Sequence[Any], scope: str | None) -> list[Any]:
    """The transforms of a config's pipeline.

    Those that cannot be built (of another version, or of a package that is not there) are left out; wrappers of
    other transforms that cannot are replaced by these.

    Raises:
        UnreadableError: One that cannot be built normalises.
    """
    with _quiet(), untouched_rng(), TRANSFORMS.switch_scope_and_registry(scope) as registry:
        return list(_build_steps(pipeline, registry))


def _build_steps(pipeline: Sequence[Any], registry: Any) -> Iterator[Any]:
    for cfg in pipeline:
        if not isinstance(cfg, Mapping):
            yield cfg
            continue
        try:
            yield registry.build(copy.deepcopy(dict(cfg)))
        except Exception as error:
            inner = cfg.get('transforms')
            # Of an older version: what it wraps is ours. Another package's options are its own.
            if isinstance(error, TypeError) and isinstance(inner, (list, tuple)):
                yield from _build_steps(inner, registry)
            elif _NORMALISES.search(str(cfg)):
                raise UnreadableError(
                    f'its pipeline normalises with {cfg.get("type")!r}, which cannot be built ({type(error).__name__})'
                ) from error


def _copies(steps: Sequence[Any]) -> Iterator[Any]:
    for step in steps:
        try:
            yield private_copy(step)
        except Exception as error:  # what holds an open file cannot be tried
            if _normalises(step):
                raise UnreadableError(
                    f'its pipeline normalises with {type(step).__name__}, which cannot be copied'
                ) from error


def _through(step: Any, values: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.dtype]:
    """The colours behind a step, and the type of its pixels; as they were where the step does not change the format."""
    found = []
    try:
        for seed in (0, 1):
            found.append(_colours(lambda image: _transformed(step, image), values, dtype, seed))
            if np.array_equal(found[0][0], values):
                return found[0]
    except Exception:
        if _normalises(step):
            raise UnreadableError(
                f'its pipeline normalises with {type(step).__name__}, which does not run on a bare picture'
            ) from None
        return values, dtype
    made, kind = found[0]
    same = made.shape == found[1][0].shape and np.allclose(made, found[1][0], rtol=1e-6, atol=1e-6)
    if same and _line(values, made) is not None:
        return made, kind
    if min(np.ptp(m) for m, _ in found) < NARROW * np.ptp(values) or _normalises(step):
        raise UnreadableError(f'what {type(step).__name__} of its pipeline makes of pixels is no (pixel - mean) / std')
    return values, dtype


def _normalises(step: Any) -> bool:
    """Whether a step, or one that it wraps, is called so."""
    try:
        return _NORMALISES.search(repr(step)) is not None
    except Exception:  # a repr of somebody else's
        return _NORMALISES.search(type(step).__name__) is not None


def _transformed(step: Callable[[dict], Any], image: np.ndarray) -> np.ndarray:
    """``(H, W, C)`` behind a step."""
    size = image.shape[:2]
    made = step(dict(img=image, img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)))
    result = made['img'] if 'img' in made else made['inputs']
    if isinstance(result, Tensor):
        result = result.permute(1, 2, 0) if result.dim() == 3 else result
        result = result.numpy()
    result = np.asarray(result)
    return result[..., None] if result.ndim == 2 else result


def _processed(preprocessor: nn.Module, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The colours behind a data preprocessor."""
    own = copy.deepcopy(preprocessor)
    errors = []
    for samples in ([BaseDataElement()], None):
        for batch in (lambda x: [x], lambda x: x[None]):

            def forward(image: np.ndarray, batch: Any = batch, samples: Any = samples) -> np.ndarray:
                image = torch.from_numpy(np.ascontiguousarray(image.reshape(*image.shape[:2], -1).transpose(2, 0, 1)))
                made = own(dict(inputs=batch(image), data_samples=copy.deepcopy(samples)), False)['inputs'][0]
                return made.detach().cpu().double().permute(1, 2, 0).numpy()

            try:
                return _colours(forward, values, dtype, 0)[0]
            except Exception as error:
                errors.append(error)
    name, reason = type(preprocessor).__name__, in_words(errors[0])[:120]
    raise UnreadableError(f'its data_preprocessor ({name}) does not run on a bare picture ({reason})')


def _colours(
    change: Callable[[np.ndarray], np.ndarray], values: np.ndarray, dtype: np.dtype, seed: int
) -> tuple[np.ndarray, np.dtype]:
    """What becomes of pictures of one colour each, read where they differ most: the rest may be padding."""
    made = []
    for colour in values:
        random.seed(seed)
        np.random.seed(seed)
        # That of pictures, on the processor. Where CUDA is not yet in use, torch's own notes the stack for later.
        torch.default_generator.manual_seed(seed)
        image = np.empty((SIDE, SIDE, len(colour)), dtype)
        image[:] = colour
        # As OpenCV decodes grey pictures.
        changed = change(image[..., 0] if len(colour) == 1 else image)
        # Some pixels of what may have been enlarged.
        made.append(changed[tuple(slice(None, None, -(-side // SIDE)) for side in changed.shape[:2])])
    stack = np.stack(made)
    spread = (stack.max(0) - stack.min(0)).sum(-1, dtype=np.float64)
    row, column = np.unravel_index(spread.argmax(), spread.shape)
    return stack[:, row, column].astype(np.float64), stack.dtype


def _line(given: np.ndarray, made: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """``made[:, c] == scale[c] * given[:, source[c]] + offset[c]``, or None where that is not so."""
    found = []
    for result in made.T:
        lines = []
        for source, colour in enumerate(given.T):
            scale, offset = np.polyfit(colour, result, 1)
            lines.append((np.abs(scale * colour + offset - result).max(), source, scale, offset))
        error, *line = min(lines)
        if not error <= TOLERANCE * np.ptp(result) or not np.ptp(result):
            return None
        found.append(line)
    source, scale, offset = zip(*found, strict=True)
    return np.array(source), np.array(scale), np.array(offset)


def _written(values: np.ndarray, least: float = 0.0) -> tuple[float, ...]:
    """The shortest numbers that these may be, as far as float32 tells: what was measured is what was written."""
    found = []
    for value in values:
        near = PRECISION * max(abs(value), least)
        shorter = (round(value, digits) for digits in range(12))
        found.append(float(next((v for v in shorter if abs(v - value) <= near), value)))
    return tuple(found)


def _loads_rgb(steps: Sequence[Any]) -> bool:
    """Whether the first step that loads a file returns RGB; MMEngine's own return BGR."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'red.png')
        Image.new('RGB', (SIDE, SIDE), (220, 120, 20)).save(path)
        for step in steps:
            try:
                image = np.asarray(step(dict(img_path=path, height=SIDE, width=SIDE))['img'])
            except Exception:
                continue
            return image.ndim == 3 and image.shape[2] >= 3 and bool(image[0, 0, 0] > image[0, 0, 2])
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
