"""An Ultralytics ``.pt`` file as a teacher: safely loaded, frozen, fused, and run without decoding."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kd_plugins.distiller import Teacher, untouched_rng
from kd_plugins.errors import DistillError, nearest
from kd_plugins.yolo.heads import BRANCHES, SUPPORTED, family_of, head_of

GREY = 114 / 255  # what Ultralytics pads images with


def find_teacher(path: Any) -> str:
    """The absolute path of a teacher's file.

    The name of an official model that is not there (``'yolo11x.pt'``) is looked up, and if need be downloaded, the
    way ``YOLO('yolo11x.pt')`` does; once, before training starts, so that several GPUs do not race for it.

    Args:
        path: File path or official name.

    Raises:
        DistillError: There is no such file.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise DistillError(f"teacher must be the path of a .pt file, e.g. teacher='yolo11x.pt', got {path!r}.")
    text = os.path.expanduser(os.fspath(path))
    if not text.lower().endswith('.pt'):
        raise DistillError(
            f'teacher {text!r} is not a .pt file; a .yaml has no trained weights, and exported models cannot be used.'
        )
    if os.path.isdir(text):
        raise DistillError(f'teacher {text!r} is a folder, not a file.')
    if os.path.isfile(text):
        return os.path.abspath(text)
    if text == os.path.basename(text):
        from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

        if text in GITHUB_ASSETS_NAMES:
            try:
                found = os.fspath(attempt_download_asset(text))
            except Exception as error:
                raise DistillError(f'teacher {text!r} could not be downloaded ({error}); give a local file.') from error
            if os.path.isfile(found):
                return os.path.abspath(found)
            raise DistillError(f'teacher {text!r} could not be downloaded; give a local file.')
    folder = os.path.dirname(text) or '.'
    if not os.path.isdir(folder):
        raise DistillError(f'teacher {text!r} does not exist, neither does the folder {folder!r}.')
    files = [f for f in os.listdir(folder) if f.endswith('.pt')]
    raise DistillError(f'teacher {text!r} does not exist; in {folder!r}: {nearest(os.path.basename(text), files)}')


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
    from ultralytics.nn.tasks import torch_safe_load

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
    # A checkpoint of a run with native distillation still wraps its student.
    model = getattr(model, 'student_model', model)
    broken = [k for k, v in model.state_dict().items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise DistillError(f'teacher {path!r} has NaN or infinite weights in {broken[0]!r} and {len(broken) - 1} more.')
    return model.float().eval()


def build_teacher(
    path: str, *, branches: Sequence[str] = ('one2many',), feats: bool = False, trusted: bool = False
) -> Teacher:
    """Load a teacher and make it as cheap to run as possible.

    Args:
        path: Absolute path of the ``.pt`` file.
        branches: Which branches of an end-to-end head to compute.
        feats: Return the head's input features too.
        trusted: See `load_model`.

    Returns:
        The teacher; tap its head (:func:`head_path`) to get its raw output.

    Raises:
        DistillError: It cannot be loaded or is of an unsupported kind.
    """
    model = load_model(path, trusted)
    family = family_of(model, 'teacher')
    head = head_of(model)
    if family == 'dense':
        _run_raw(head, tuple(branches), feats)
    with untouched_rng():
        model.fuse(verbose=False)
    return Teacher(
        model,
        _run,
        functools.partial(_prepare, model, _largest_stride(model) if family == 'dense' else 1),
        name=f'{os.path.basename(path)} ({type(model).__name__}, {type(head).__name__})',
        checkpoint=path,
        normalization="the student's batch as it is",
        classes=class_names(getattr(model, 'names', None)),
    )


def class_names(names: Any) -> list[str] | None:
    """Class names in order, from Ultralytics' dict or list."""
    if isinstance(names, Mapping):
        return [str(names[k]) for k in sorted(names)]
    return None if names is None else [str(n) for n in names]


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
    return {**raw, 'boxes': cut(raw['boxes']), 'scores': cut(raw['scores']), 'feats': feats}


def _run(model: nn.Module, inputs: Tensor, samples: Any, modules: Sequence[str]) -> None:
    model(inputs)


def _prepare(model: nn.Module, stride: int, inputs: Tensor, samples: Any) -> Tensor:
    # A pyramid that is deeper than the student's needs sides that its largest stride divides.
    h, w = inputs.shape[-2:]
    right, below = -w % stride, -h % stride
    return pad(inputs, (0, right, 0, below), value=GREY) if right or below else inputs


def _largest_stride(model: nn.Module) -> int:
    return int(max(float(s) for s in head_of(model).stride))


def _run_raw(head: nn.Module, branches: tuple[str, ...], feats: bool) -> None:
    """Let this private copy of a head return its raw predictions, without decoding, top-k, prototypes or keypoints."""
    if not hasattr(head, 'forward_head') or not hasattr(head, 'one2many'):
        raise DistillError(
            f'{type(head).__name__} has no forward_head; this version of Ultralytics is not understood: install '
            f'ultralytics>=8.4.140,<8.5. Supported are {SUPPORTED}.'
        )
    have = [b for b in BRANCHES if _has_branch(head, b)]
    wanted = [b for b in branches if b in have] or have[:1]
    # `fuse` of the head would throw one of its branches away; the rest of the model is fused.
    head.fuse = _keep
    head.forward = functools.partial(_raw_forward, head, tuple(wanted), feats)


def _has_branch(head: nn.Module, branch: str) -> bool:
    name = 'cv2' if branch == 'one2many' else 'one2one_cv2'
    return getattr(head, name, None) is not None


def _keep() -> None:
    """Instead of the head's ``fuse``."""


def _raw_forward(head: nn.Module, branches: tuple[str, ...], feats: bool, x: list[Tensor]) -> dict[str, Any]:
    result = {}
    for branch in branches:
        # Mask, keypoint and angle layers are not distilled; without them `forward_head` skips their part.
        parts = {k: v if k in ('box_head', 'cls_head') else None for k, v in getattr(head, branch).items()}
        raw = head.forward_head(x, **parts)
        # Without channels they still tell the size of the levels, and cost nothing to record.
        kept = x if feats else [f[:, :0] for f in x]
        result[branch] = {'boxes': raw['boxes'], 'scores': raw['scores'], 'feats': kept}
    return result
