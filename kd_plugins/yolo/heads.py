"""Ultralytics' dense heads, read into :class:`~kd_plugins.predictions.DensePredictions`.

Registered by name, so importing this module imports no framework. In training a head returns ``{boxes (B, 4R, A),
scores (B, nc, A), feats, ...}``; end-to-end heads (YOLOv10, YOLO26) nest two of these under ``one2many`` and
``one2one``; in evaluation the same dict is the last element of a tuple. Tested against each head's own decoding.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.predictions import ClassPredictions, DensePredictions, MaskPredictions, readable, register_reader
from kd_plugins.predictions.dense import ROTATED

BRANCHES = ('one2many', 'one2one')

SUPPORTED = (
    'detect, segment, pose and obb models (YOLOv5u, v8, v9, v10, 11, 12 and 26, with any pyramid levels) and classify '
    'models'
)


def raw_predictions(outputs: Any) -> Mapping[str, Any]:
    """The dict of raw predictions in what a head (or model) returned in training or evaluation.

    Raises:
        DistillError: There is none.
    """
    found = outputs
    while isinstance(found, (tuple, list)) and len(found):
        found = found[-1]
    if not isinstance(found, Mapping) or not (set(BRANCHES) & set(found) or {'boxes', 'scores', 'feats'} <= set(found)):
        keys = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise DistillError(
            f'The head returned {keys} where {{boxes, scores, feats}} was expected; this version of Ultralytics is '
            'not understood: install ultralytics>=8.4.140,<8.5.'
        )
    return found


def select_branch(outputs: Any, branch: str = 'one2many') -> Mapping[str, Any]:
    """One branch of the raw predictions: that of the given name, or the only one that is there.

    A head that is not end-to-end has one branch without a name; a fused end-to-end model has lost one of the two.

    Args:
        outputs: What the head returned.
        branch: ``'one2many'`` or ``'one2one'``.
    """
    found = raw_predictions(outputs)
    if 'boxes' in found:
        return found
    for name in (branch, *BRANCHES):
        if found.get(name):
            return found[name]
    raise DistillError('The head returned empty predictions in both of its branches; the model file is incomplete.')


@register_reader('ultralytics.Detect')
@register_reader('ultralytics.v10Detect')
@register_reader('ultralytics.Segment')
@register_reader('ultralytics.Segment26')
@register_reader('ultralytics.Pose')
@register_reader('ultralytics.Pose26')
def read_detect(head: nn.Module, outputs: Any, *, training: bool, part: str | None = None) -> DensePredictions:
    """Class logits, distance bins (when there are more than one) and distances; of two branches the one-to-many."""
    return _read(head, select_branch(outputs, part or BRANCHES[0]), rotated=False)


@register_reader('ultralytics.OBB')
@register_reader('ultralytics.OBB26')
def read_obb(head: nn.Module, outputs: Any, *, training: bool, part: str | None = None) -> DensePredictions:
    """As `read_detect`, but distances count along the axes of the rotated box: they are ``box``, not ``ltrb``."""
    return _read(head, select_branch(outputs, part or BRANCHES[0]), rotated=True)


@register_reader('ultralytics.Segment', form=MaskPredictions)
@register_reader('ultralytics.Segment26', form=MaskPredictions)
def read_masks(head: nn.Module, outputs: Any, *, training: bool, part: str | None = None) -> MaskPredictions:
    """As `read_detect`, with mask coefficients and prototypes; YOLO26's come with semantic logits in training."""
    raw = select_branch(outputs, part or BRANCHES[0])
    found = raw.get('proto')
    found = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(found, Tensor) or 'mask_coefficient' not in raw:
        raise DistillError('The head returned no mask coefficients and prototypes.')
    return MaskPredictions(_read(head, raw, rotated=False, masks=True), _full(found))


def _read(head: nn.Module, raw: Mapping[str, Any], rotated: bool, masks: bool = False) -> DensePredictions:
    boxes, scores = _full(raw['boxes']), _full(raw['scores'])
    sizes = [tuple(f.shape[-2:]) for f in raw['feats']]
    strides = list(strides_of(head))
    bins = head.reg_max
    if boxes.shape[1] != 4 * bins or scores.shape[1] != head.nc or len(strides) != len(sizes):
        raise DistillError(
            f'{type(head).__name__} returned boxes {tuple(boxes.shape)} and scores {tuple(scores.shape)} on '
            f'{len(sizes)} levels, which does not fit reg_max={bins}, nc={head.nc} and {len(strides)} strides.'
        )
    flat = [boxes.transpose(1, 2), scores.transpose(1, 2)]
    if masks:
        flat.append(_full(raw['mask_coefficient']).transpose(1, 2))
    order = sorted(range(len(strides)), key=strides.__getitem__)
    if order != list(range(len(strides))):
        lengths = [h * w for h, w in sizes]
        flat = [torch.cat([t.split(lengths, 1)[i] for i in order], 1) for t in flat]
    boxes, scores = flat[:2]
    sizes, strides = [sizes[i] for i in order], [strides[i] for i in order]
    dist = boxes.unflatten(2, (4, bins)) if bins > 1 else None
    ltrb = boxes if dist is None else expected_distance(dist)
    absent = {'obj': 'Ultralytics heads have no objectness'}
    if dist is None:
        absent['dist'] = f'{type(head).__name__} regresses distances without bins (reg_max=1)'
    if rotated:
        absent['ltrb'] = 'its boxes are rotated'
    return DensePredictions(
        cls=scores,
        activation='sigmoid',
        level_sizes=tuple(sizes),
        strides=tuple(strides),
        points=grid_points(tuple(sizes), tuple(strides), boxes.device, boxes.dtype),
        ltrb=None if rotated else ltrb,
        dist=dist,
        box=ltrb if rotated else None,
        box_coding=ROTATED if rotated else None,
        coefficients=flat[2] if masks else None,
        absent=absent,
        unread=_besides(head, rotated),
    )


def _besides(head: nn.Module, rotated: bool) -> tuple[str, ...]:
    """What a head predicts that no term teaches."""
    found = ['keypoints'] if hasattr(head, 'kpt_shape') else []
    return (*found, 'angles') if rotated else tuple(found)


def expected_distance(dist: Tensor) -> Tensor:
    """``(..., R)`` bin logits to their expected distance in strides."""
    bins = torch.arange(dist.shape[-1], device=dist.device, dtype=dist.dtype)
    # Multiply and add, not matmul: autocast would compute that in half precision.
    return (dist.softmax(-1) * bins).sum(-1)


@functools.lru_cache(maxsize=32)
def grid_points(
    sizes: tuple[tuple[int, int], ...], strides: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """``(A, 2)`` centres of the cells ``(x, y)`` in pixels, level by level, row by row.

    The same tensor for the same arguments: student and teacher have the same points when they are the same object,
    which the host can see without waiting for the GPU.
    """
    levels = []
    # A tensor made while something is predicted could not be used in a training step.
    with torch.inference_mode(False):
        for (h, w), stride in zip(sizes, strides, strict=True):
            x = (torch.arange(w, device=device, dtype=dtype) + 0.5) * stride
            y = (torch.arange(h, device=device, dtype=dtype) + 0.5) * stride
            grid = torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1], -1)
            levels.append(grid.reshape(-1, 2))
        return torch.cat(levels)


_strides: weakref.WeakKeyDictionary[nn.Module, tuple[Any, tuple[float, ...]]] = weakref.WeakKeyDictionary()


def strides_of(head: nn.Module) -> tuple[float, ...]:
    """The strides of a head's levels. They are a tensor on its device, for which the host waits only once."""
    known = _strides.get(head)
    if known is None or known[0] is not head.stride:
        known = _strides[head] = head.stride, tuple(float(s) for s in head.stride)
    return known[1]


def head_of(model: nn.Module) -> nn.Module:
    """The last layer of an Ultralytics model."""
    layers = getattr(model, 'model', None)
    if not isinstance(layers, nn.Module) or not len(list(layers.children())):
        raise DistillError(f'{type(model).__name__} is not an Ultralytics model; supported are {SUPPORTED}.')
    return list(layers.children())[-1]


def head_path(model: nn.Module) -> str:
    """Dotted path of the head."""
    return f'model.{len(list(model.model.children())) - 1}'


def is_end_to_end(head: nn.Module) -> bool:
    """Whether a head has a one-to-one branch besides the other (YOLOv10, YOLO26)."""
    return getattr(head, 'one2one_cv2', None) is not None


def is_classifier(model: nn.Module) -> bool:
    """Whether a model predicts classes of whole images."""
    return readable(head_of(model), ClassPredictions)


def refuse_unsupported(model: nn.Module, who: str) -> None:
    """Refuse a model whose head cannot be read.

    Args:
        model: The unwrapped model.
        who: ``'student'`` or ``'teacher'``, for the message.

    Raises:
        DistillError: The message says which can.
    """
    head = head_of(model)
    if not any(readable(head, form) for form in (DensePredictions, ClassPredictions)):
        raise DistillError(
            f'The {who} has the head {type(head).__name__}, which cannot be distilled; supported are {SUPPORTED}, not '
            'RT-DETR, YOLO-World / YOLOE, semantic segmentation or depth.'
        )


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@register_reader('ultralytics.Classify', form=ClassPredictions)
def read_classify(head: nn.Module, outputs: Any, *, training: bool) -> ClassPredictions:
    """The logits: all that the head returns in training, the second of (probabilities, logits) in evaluation."""
    return ClassPredictions(outputs[-1] if isinstance(outputs, (tuple, list)) else outputs)
