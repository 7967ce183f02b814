"""The teacher of a callback. An Ultralytics ``.pt`` is safely loaded, frozen, fused, and run without decoding."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kd_plugins.distiller import untouched_rng
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.errors import DistillError, in_words, nearest, shown
from kd_plugins.teachers import (
    ULTRALYTICS,
    FrozenTeacher,
    PixelFormat,
    Renormalize,
    Resized,
    build_source,
    find_source,
    teacher_kind,
)
from kd_plugins.yolo.heads import BRANCHES, SUPPORTED, family_of, head_of, strides_of

GREY = ULTRALYTICS.pad


def find_any_teacher(teacher: Any) -> str | dict[str, Any]:
    """The absolute path of a ``.pt`` file, or the checked mapping of a teacher of another framework.

    Args:
        teacher: See :func:`find_teacher`; or ``dict(config=, checkpoint=)`` (a detector of mmdet), ``dict(timm=,
            checkpoint=)`` (a classifier) or ``dict(ultralytics=)``.

    Raises:
        DistillError: It is misspelt or a file is missing.
    """
    if not isinstance(teacher, Mapping):
        return find_teacher(teacher)
    if teacher_kind(teacher) != 'ultralytics':
        return find_source(teacher)
    others = sorted(set(teacher) - {'ultralytics'})
    if others:
        raise DistillError(f'teacher=dict(ultralytics=...): write {", ".join(others)} beside teacher, not inside it.')
    return find_teacher(teacher['ultralytics'])


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
    broken = [k for k, v in model.state_dict().items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise DistillError(f'teacher {path!r} has NaN or infinite weights in {broken[0]!r} and {len(broken) - 1} more.')
    return model.float().eval()


def build_teacher(
    teacher: str | Mapping[str, Any],
    *,
    branches: Sequence[str] = ('one2many',),
    feats: bool = False,
    masks: bool = False,
    trusted: bool = False,
) -> Teacher:
    """Load a teacher for an Ultralytics student.

    Args:
        teacher: What :func:`find_any_teacher` returned.
        branches: Which branches of an end-to-end head to compute.
        feats: Return the head's input features too.
        masks: Return mask coefficients and prototypes too, where the head has them.
        trusted: See `load_model`.

    Raises:
        DistillError: It cannot be loaded or is of an unsupported kind.
    """
    if isinstance(teacher, Mapping):
        return build_source(teacher, ULTRALYTICS)[0]
    return load_teacher(teacher, branches=branches, feats=feats, masks=masks, trusted=trusted)


def load_teacher(
    path: str,
    student: PixelFormat = ULTRALYTICS,
    *,
    branches: Sequence[str] = ('one2many',),
    feats: bool = False,
    masks: bool = False,
    trusted: bool = False,
    size: tuple[int, int] | None = None,
) -> Teacher:
    """Load a ``.pt`` file and make it as cheap to run as possible.

    Args:
        path: Its absolute path.
        student: What the batches look like that it will be given.
        branches: See `build_teacher`, as ``feats``, ``masks`` and ``trusted``.
        size: ``(height, width)`` of the images that a classifier is given, else as they are.

    Returns:
        The teacher; tap its head to get its raw output.

    Raises:
        DistillError: It cannot be loaded, is of an unsupported kind, or a detector with a size.
    """
    model = load_model(path, trusted)
    family = family_of(model, 'teacher')
    head = head_of(model)
    if family == 'dense':
        _run_raw(head, tuple(branches), feats, masks and has_masks(head))
    with untouched_rng():
        model.fuse(verbose=False)
    inputs: Any = Renormalize(student, ULTRALYTICS)
    shown = "the student's batch as it is" if inputs.same else inputs.description
    if size is not None:
        if family == 'dense':
            raise DistillError(
                f'teacher.input_size={size} is for classifiers: the positions of a detector must be those of its '
                'student; leave it out.'
            )
        inputs = Resized(inputs, size)
        shown = inputs.description
    return FrozenTeacher(
        model,
        functools.partial(_run_dense, _largest_stride(model)) if family == 'dense' else _run,
        inputs,
        name=f'{os.path.basename(path)} ({type(model).__name__}, {type(head).__name__})',
        checkpoint=path,
        normalization=shown,
        classes=class_names(getattr(model, 'names', None)),
        num_classes=class_count(model),
        head=head_path(model),
        kind='ultralytics',
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


def has_masks(head: nn.Module) -> bool:
    """Whether a head predicts masks as coefficients of prototypes."""
    return hasattr(head, 'proto') and hasattr(head, 'nm')


def head_path(model: nn.Module) -> str:
    """Dotted path of the head."""
    return f'model.{len(list(model.model.children())) - 1}'


def input_channels(model: nn.Module) -> int | None:
    """Number of image channels a model takes."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels * (1 if module.groups == 1 else module.groups)
    return None


def follow(teacher: Teacher, image: Tensor, student: nn.Module) -> Tensor:
    """Bring the teacher to the device, precision and memory format in which the student trains.

    Args:
        teacher: The teacher; moved in place.
        image: ``(B, C, H, W)`` batch of the student.
        student: The unwrapped student.

    Returns:
        The image in the teacher's precision.
    """
    kind = image.device.type
    if torch.is_autocast_enabled(kind):
        # Autocast would cast the frozen float32 weights anew in every forward: it caches trainable ones only.
        image = image.to(torch.get_autocast_dtype(kind))
    teacher.to(image)
    weight = next((p for p in student.parameters() if p.dim() == 4 and p.shape[1] > 1), None)
    if weight is not None and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        own = next((p for p in teacher.model.parameters() if p.dim() == 4 and p.shape[1] > 1), None)
        if own is not None and own.is_contiguous():
            teacher.model.to(memory_format=torch.channels_last)
    return image


def crop_levels(raw: Any, sizes: Sequence[tuple[int, int]], strides: Sequence[float], wanted: dict) -> Any:
    """Cut the cells that padding added off every level of raw predictions.

    Args:
        raw: ``{boxes (B, 4R, A), scores (B, nc, A), feats}``.
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
    flat = {k: cut(raw[k]) for k in ('boxes', 'scores', 'mask_coefficient') if k in raw}
    return {**raw, **flat, 'feats': feats}


def _run(model: nn.Module, inputs: Tensor, samples: Any, modules: Sequence[str]) -> None:
    model(inputs)


def _run_dense(stride: int, model: nn.Module, inputs: Tensor, samples: Any, modules: Sequence[str]) -> None:
    # A pyramid that is deeper than the student's needs sides that its largest stride divides.
    h, w = inputs.shape[-2:]
    right, below = -w % stride, -h % stride
    # `_raw_forward` takes the cells that padding added off again.
    head_of(model).kd_padded = ((h, w), (h + below, w + right)) if right or below else None
    model(pad(inputs, (0, right, 0, below), value=GREY) if right or below else inputs)


def _largest_stride(model: nn.Module) -> int:
    return int(max(strides_of(head_of(model))))


def _run_raw(head: nn.Module, branches: tuple[str, ...], feats: bool, masks: bool = False) -> None:
    """Let this private copy of a head return its raw predictions, without decoding, top-k or keypoints."""
    if not hasattr(head, 'forward_head') or not hasattr(head, 'one2many'):
        raise DistillError(
            f'{type(head).__name__} has no forward_head; this version of Ultralytics is not understood: install '
            f'ultralytics>=8.4.140,<8.5. Supported are {SUPPORTED}.'
        )
    have = [b for b in BRANCHES if _has_branch(head, b)]
    wanted = [b for b in branches if b in have] or have[:1]
    # `fuse` of the head would throw one of its branches away; the rest of the model is fused.
    head.fuse = _keep
    head.kd_padded = None
    head.forward = functools.partial(_raw_forward, head, tuple(wanted), feats, masks)


def _has_branch(head: nn.Module, branch: str) -> bool:
    name = 'cv2' if branch == 'one2many' else 'one2one_cv2'
    return getattr(head, name, None) is not None


def _keep() -> None:
    """Instead of the head's ``fuse``."""


def _raw_forward(
    head: nn.Module, branches: tuple[str, ...], feats: bool, masks: bool, x: list[Tensor]
) -> dict[str, Any]:
    wanted = ('box_head', 'cls_head', *(['mask_head'] if masks else []))
    extra = {'proto': _prototypes(head, x)} if masks else {}
    result = {}
    for branch in branches:
        # Mask, keypoint and angle layers that are not distilled: without them `forward_head` skips their part.
        parts = {k: v if k in wanted else None for k, v in getattr(head, branch).items()}
        raw = head.forward_head(x, **parts)
        # Without channels they still tell the size of the levels, and cost nothing to record.
        kept = x if feats else [f[:, :0] for f in x]
        found = {'boxes': raw['boxes'], 'scores': raw['scores'], 'feats': kept, **extra}
        if masks:
            found['mask_coefficient'] = raw['mask_coefficient']
        result[branch] = _without_padding(head, found) if head.kd_padded else found
    return result


def _prototypes(head: nn.Module, x: list[Tensor]) -> Tensor:
    # YOLO26 fuses all levels into its prototypes, the others take the finest one.
    found = head.proto(x if hasattr(head.proto, 'feat_refine') else x[0])
    return found[0] if isinstance(found, (tuple, list)) else found


def _without_padding(head: nn.Module, raw: dict[str, Any]) -> dict[str, Any]:
    (h, w), (padded, _) = head.kd_padded
    sizes, strides = [tuple(f.shape[-2:]) for f in raw['feats']], list(strides_of(head))
    result = crop_levels(raw, sizes, strides, {s: (math.ceil(h / s), math.ceil(w / s)) for s in strides})
    if 'proto' in raw:
        stride = padded / raw['proto'].shape[-2]
        result = {**result, 'proto': raw['proto'][..., : math.ceil(h / stride), : math.ceil(w / stride)]}
    return result
