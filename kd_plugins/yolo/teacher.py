"""An Ultralytics ``.pt`` as a teacher: safely loaded, frozen, fused, and run without decoding."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller import Capture, Tap, untouched_rng
from kd_plugins.errors import DistillError, in_words, nearest, shown
from kd_plugins.predictions import DensePredictions, Form
from kd_plugins.teachers import ULTRALYTICS, FrozenTeacher, Padding, PixelFormat, Renormalize, Resized
from kd_plugins.yolo.heads import (
    BRANCHES,
    SUPPORTED,
    head_of,
    head_path,
    is_classifier,
    refuse_unsupported,
    strides_of,
)
from kd_plugins.yolo.taps import ultralytics_tap

GREY = ULTRALYTICS.pad


def find_teacher(path: Any) -> str:
    """The absolute path of a teacher's file.

    What is not there is looked up, and if need be downloaded, the way ``YOLO(path)`` does it: official models
    (``'yolo11x.pt'``, ``'yolo11x'``), files in Ultralytics' folder of weights, internet addresses, and models of
    Ultralytics' platform (``ul://user/project/model``); once, before training starts, so that several GPUs do not race
    for it.

    Args:
        path: File path, official name or address.

    Raises:
        DistillError: There is no such file, or it cannot be downloaded.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise DistillError(f"teacher must be the path of a .pt file, e.g. teacher='yolo11x.pt', got {_no_path(path)}.")
    given = os.path.expanduser(os.fspath(path))
    text = _download(given) if '://' in given else _official(given)
    if not text.lower().endswith('.pt'):
        what = repr(given) if text == given else f'{given!r} ({os.path.basename(text)})'
        raise DistillError(
            f'teacher {what} is not a .pt file; a .yaml has no trained weights, and exported models cannot be used.'
        )
    if os.path.isdir(text):
        raise DistillError(f'teacher {text!r} is a folder, not a file.')
    if os.path.isfile(text):
        return os.path.abspath(text)
    folder = os.path.dirname(text) or '.'
    if not os.path.isdir(folder):
        raise DistillError(f'teacher {text!r} does not exist, neither does the folder {folder!r}.')
    files = [f for f in os.listdir(folder) if f.endswith('.pt')]
    raise DistillError(f'teacher {text!r} does not exist; in {folder!r}: {nearest(os.path.basename(text), files)}')


def _no_path(value: Any) -> str:
    """What was given in place of a path, and what to write for it."""
    if not isinstance(value, nn.Module):
        return shown(value)
    # A `YOLO` holds its network. Not its own `ckpt_path`: after `train()` that is still the file it started from.
    known = getattr(getattr(value, 'model', value), 'pt_path', None) or getattr(value, 'pt_path', None)
    kind = f'an object of type {type(value).__name__}'
    if isinstance(known, str) and os.path.isfile(known):
        return f'{kind}: write teacher={known!r}, the file that it was loaded from'
    how = (
        "model.save('teacher.pt')"
        if callable(getattr(value, 'save', None))
        else "torch.save({'model': model}, 'teacher.pt')"
    )
    return f"{kind}: save it by {how} and write teacher='teacher.pt'"


def _official(text: str) -> str:
    """The file that Ultralytics means by a name; as it is, where it means nothing by it."""
    if os.path.exists(text):
        return text
    from ultralytics.utils import SETTINGS
    from ultralytics.utils.checks import check_model_file_from_stem, check_yolov5u_filename
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

    name = os.fspath(check_yolov5u_filename(os.fspath(check_model_file_from_stem(text)), verbose=False))
    if os.path.basename(name) not in GITHUB_ASSETS_NAMES:
        kept = os.path.join(SETTINGS['weights_dir'], text)
        return kept if text.lower().endswith('.pt') and os.path.isfile(kept) else text
    try:
        found = os.fspath(attempt_download_asset(name))
    except Exception as error:
        raise DistillError(
            f'teacher {text!r} could not be downloaded ({in_words(error)}); give a local file.'
        ) from error
    if not os.path.isfile(found):
        raise DistillError(f'teacher {text!r} could not be downloaded; give a local file.')
    return found


def _download(address: str) -> str:
    from ultralytics.utils import SETTINGS
    from ultralytics.utils.checks import check_file

    try:
        return os.fspath(check_file(address, download_dir=SETTINGS['weights_dir']))
    except Exception as error:
        raise DistillError(
            f'teacher {address!r} could not be downloaded ({in_words(error)}); give a local file.'
        ) from error


def load_model(path: str, trusted: bool = False) -> nn.Module:
    """Load an Ultralytics model from its file, in float32 and evaluation mode.

    Args:
        path: Absolute path.
        trusted: Allow the file to run code while it is loaded (needed for models with classes of one's own), and
            Ultralytics to pip-install packages that it names. By default only the known classes of Ultralytics and
            torch are restored.

    Raises:
        DistillError: The file is damaged or not an Ultralytics model.
    """
    from ultralytics.nn.tasks import BaseModel, torch_safe_load

    options = {'safe_only': not trusted} if 'safe_only' in inspect.signature(torch_safe_load).parameters else {}
    try:
        with untouched_rng():
            checkpoint, _ = torch_safe_load(path, **options)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else 'no details'
        advice = '' if trusted else '; if you trust the file and it uses classes of its own, set trusted=True'
        raise DistillError(
            f'teacher {path!r} ({os.path.getsize(path):,} bytes) cannot be loaded: {type(error).__name__}: {first}'
            f'{advice}.'
        ) from error
    model = (checkpoint.get('ema') or checkpoint.get('model')) if isinstance(checkpoint, dict) else None
    if not isinstance(model, nn.Module):
        raise DistillError(f'teacher {path!r} holds no Ultralytics model (no "model" or "ema" entry).')
    if set(checkpoint) == {'model'} and not isinstance(model, BaseModel):
        # Of what is no dict, Ultralytics takes the attribute `model`.
        raise DistillError(
            f'teacher {path!r} holds a whole network, written by torch.save(network, path), where Ultralytics expects '
            "an entry for it: write it by torch.save({'model': network}, path), or by model.save(path) of a YOLO."
        )
    # A checkpoint of a run with native distillation still wraps its student.
    model = getattr(model, 'student_model', model)
    model = model.float().eval()
    floats = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    # A sum is finite only if all of it is, and takes a quarter of the time of looking at every weight.
    sums = [v.sum() for v in floats.values()]
    if not torch.isfinite(torch.stack(sums).sum()):
        broken = [k for k, v in floats.items() if not torch.isfinite(v).all()]
        raise DistillError(f'teacher {path!r} has NaN or infinite weights in {broken[0]!r} and {len(broken) - 1} more.')
    return model


class UltralyticsTeacher(FrozenTeacher):
    """A model of Ultralytics that returns what its head computes before decoding, and of that only what is asked for.

    Args:
        model: The loaded model, fused.
        prepare: See `FrozenTeacher`.
        branch: Which branch of an end-to-end head ``'head'`` is.
        **facts: See `FrozenTeacher`.
    """

    def __init__(self, model: nn.Module, prepare: Any, branch: str = BRANCHES[0], **facts: Any) -> None:
        resolve = functools.partial(ultralytics_tap, branch=branch)
        # A pyramid that is deeper than the student's needs sides that its largest stride divides.
        padding = None if is_classifier(model) else Padding(_largest_stride(model), GREY)
        super().__init__(
            model, _run, prepare, head=head_path(model), resolve=resolve, kind='ultralytics', padding=padding, **facts
        )
        if not is_classifier(model):
            _run_raw(head_of(model), (branch,), False)

    def _cut(self, capture: Capture, padded: tuple[int, ...], inside: tuple[int, int]) -> None:
        # Its flat predictions know their levels.
        calls = capture.calls.pop(self.head, None)
        super()._cut(capture, padded, inside)
        if calls:
            head = head_of(self.model)
            cut = {b: _without_padding(head, raw, padded, inside) for b, raw in calls[0].output.items()}
            capture.put(self.head, cut, calls[0].training)

    def expect(self, needs: Sequence[tuple[Tap, type[Form] | None]]) -> None:
        """Compute the branches of the head that are tapped: boxes and classes, or all that the head has where another
        form than detections is compared."""
        if is_classifier(self.model):
            return
        taps = [(tap, form) for tap, form in needs if tap.module == self.head]
        branches = tuple(dict.fromkeys(tap.part for tap, _ in taps if tap.part)) or BRANCHES[:1]
        _run_raw(head_of(self.model), branches, any(form not in (None, DensePredictions) for _, form in taps))


def load_teacher(
    path: str,
    student: PixelFormat = ULTRALYTICS,
    *,
    branch: str = BRANCHES[0],
    trusted: bool = False,
    size: tuple[int, int] | None = None,
) -> UltralyticsTeacher:
    """Load a ``.pt`` file and make it as cheap to run as possible.

    Args:
        path: Its absolute path.
        student: What the batches look like that it will be given.
        branch: Which branch of an end-to-end head ``'head'`` is.
        trusted: See `load_model`.
        size: ``(height, width)`` of the images that a classifier is given, else as they are.

    Returns:
        The teacher; tap its head to get its raw output.

    Raises:
        DistillError: It cannot be loaded, is of an unsupported kind, or a detector with a size.
    """
    model = load_model(path, trusted)
    refuse_unsupported(model, 'teacher')
    head = head_of(model)
    if not is_classifier(model):
        _refuse_unknown(head)
        # The head's own would throw one of its branches away; the rest of the model is fused.
        head.fuse = _keep
    with untouched_rng():
        model.fuse(verbose=False)
    inputs: Any = Renormalize(student, ULTRALYTICS, channels=input_channels(model))
    shown = "the student's batch as it is" if inputs.same else inputs.description
    if size is not None:
        if not is_classifier(model):
            raise DistillError(
                f'teacher.input_size={size} is for classifiers: the positions of a detector must be those of its '
                'student; leave it out.'
            )
        inputs = Resized(inputs, size)
        shown = inputs.description
    return UltralyticsTeacher(
        model,
        inputs,
        branch,
        name=f'{os.path.basename(path)} ({type(model).__name__}, {type(head).__name__})',
        checkpoint=path,
        normalization=shown,
        classes=class_names(getattr(model, 'names', None)),
        num_classes=class_count(model),
        channels=input_channels(model),
    )


def class_names(names: Any) -> list[str] | None:
    """Class names in order, from Ultralytics' dict or list."""
    if isinstance(names, Mapping):
        return [str(names[k]) for k in sorted(names)]
    return None if names is None else [str(n) for n in names]


def class_count(model: nn.Module) -> int | None:
    """How many classes an Ultralytics model predicts."""
    head = head_of(model)
    number = getattr(head, 'nc', None)
    return number if isinstance(number, int) else getattr(getattr(head, 'linear', None), 'out_features', None)


def input_channels(model: nn.Module) -> int | None:
    """Number of image channels a model takes."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels * (1 if module.groups == 1 else module.groups)
    return None


def crop_levels(raw: Any, sizes: Sequence[tuple[int, int]], strides: Sequence[float], wanted: dict) -> Any:
    """Cut the cells that padding added off every level of raw predictions.

    Args:
        raw: ``{boxes (B, 4R, A), scores (B, nc, A), feats}``, and whatever else the head says of its ``A`` positions.
        sizes: ``(h, w)`` of every level of ``raw``.
        strides: Stride of every level.
        wanted: ``(h, w)`` by stride; levels of other strides stay.
    """
    target = [wanted.get(s, size) for s, size in zip(strides, sizes, strict=True)]
    if list(target) == list(sizes):
        return raw
    lengths = [h * w for h, w in sizes]

    def cut(tensor: Tensor) -> Tensor:
        levels = [
            level.unflatten(2, size)[:, :, :h, :w].flatten(2)
            for level, size, (h, w) in zip(tensor.split(lengths, 2), sizes, target, strict=True)
        ]
        return torch.cat(levels, 2)

    feats = [f[..., :h, :w] for f, (h, w) in zip(raw['feats'], target, strict=True)]
    flat = {k: cut(v) for k, v in raw.items() if isinstance(v, Tensor) and v.shape[2:] == (sum(lengths),)}
    return {**raw, **flat, 'feats': feats}


def _run(model: nn.Module, inputs: Tensor, samples: Any, modules: Sequence[str]) -> None:
    model(inputs)


def _largest_stride(model: nn.Module) -> int:
    return int(max(strides_of(head_of(model))))


def _refuse_unknown(head: nn.Module) -> None:
    if not hasattr(head, 'forward_head') or not hasattr(head, 'one2many'):
        raise DistillError(
            f'{type(head).__name__} has no forward_head; this version of Ultralytics is not understood: install '
            f'ultralytics>=8.4.140,<8.5. Supported are {SUPPORTED}.'
        )


def _run_raw(head: nn.Module, branches: tuple[str, ...], whole: bool) -> None:
    """Let this private copy of a head return its raw predictions, without decoding or top-k.

    Args:
        head: The head.
        branches: Which of its branches, as far as it has them.
        whole: Whether masks, keypoints and angles are computed too.
    """
    have = [b for b in BRANCHES if _has_branch(head, b)]
    wanted = [b for b in branches if b in have] or have[:1]
    head.forward = functools.partial(_raw_forward, head, tuple(wanted), whole)


def _has_branch(head: nn.Module, branch: str) -> bool:
    name = 'cv2' if branch == 'one2many' else 'one2one_cv2'
    return getattr(head, name, None) is not None


def _keep() -> None:
    """Instead of the head's ``fuse``."""


def _raw_forward(head: nn.Module, branches: tuple[str, ...], whole: bool, x: list[Tensor]) -> dict[str, Any]:
    extra = {'proto': _prototypes(head, x)} if whole and hasattr(head, 'proto') else {}
    result = {}
    for branch in branches:
        # Mask, keypoint and angle layers that are not distilled: without them `forward_head` skips their part.
        parts = {k: v if whole or k in ('box_head', 'cls_head') else None for k, v in getattr(head, branch).items()}
        # Levels without channels still tell their size, and cost nothing to record.
        result[branch] = {**head.forward_head(x, **parts), 'feats': [f[:, :0] for f in x], **extra}
    return result


def _prototypes(head: nn.Module, x: list[Tensor]) -> Tensor:
    # YOLO26 fuses all levels into its prototypes, the others take the finest one.
    found = head.proto(x if hasattr(head.proto, 'feat_refine') else x[0])
    return found[0] if isinstance(found, (tuple, list)) else found


def _without_padding(
    head: nn.Module, raw: dict[str, Any], padded: tuple[int, ...], inside: tuple[int, int]
) -> dict[str, Any]:
    h, w = inside
    sizes, strides = [tuple(f.shape[-2:]) for f in raw['feats']], list(strides_of(head))
    result = crop_levels(raw, sizes, strides, {s: (math.ceil(h / s), math.ceil(w / s)) for s in strides})
    if 'proto' in raw:
        stride = padded[0] / raw['proto'].shape[-2]
        result = {**result, 'proto': raw['proto'][..., : math.ceil(h / stride), : math.ceil(w / stride)]}
    return result
