"""mmdet's and mmrotate's dense heads, read into :class:`~kd_plugins.predictions.DensePredictions`.

Registered by name, so importing this module imports no framework; coders and prior generators are used through
the head. What a head's numbers mean was taken from mmdet 3.3 / OneDL mmdetection 3.5 and OneDL mmrotate 1.2, and is
tested against each head's own ``predict_by_feat``. All decoding is in float32 and differentiable. Of rotated boxes the
four sides are read, in the coding of the head; their angles are not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.predictions import DensePredictions, register_reader
from kd_plugins.predictions.dense import ROTATED

Maps = Sequence[Tensor]  # one (B, channels, h, w) map per level
#: What a rotated head says of the fields it leaves None, and what no term teaches.
UNREAD: dict[str, Any] = dict(absent={'ltrb': 'its boxes are rotated'}, unread=('angles',))


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of one head on one input, in ascending order of stride.

    Attributes:
        order: Index of every level in the head's own order (YOLOv3 goes from coarse to fine).
        sizes: ``(h, w)`` of every level.
        strides: Stride of every level in pixels.
        priors: ``(A, 2)`` points, ``(A, 4)`` anchor boxes or ``(A, 5)`` rotated ones, in pixels, float32.
        num_priors: Priors per location.
        centers: ``(A, 2)`` points, or the anchors' centres.
        stride_of: ``(A, 1)`` stride of every position.
    """

    order: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    strides: tuple[float, ...]
    priors: Tensor
    num_priors: int
    centers: Tensor
    stride_of: Tensor

    def flatten(self, maps: Maps, channels: int) -> Tensor:
        """``(B, A, channels)`` of per-level ``(B, num_priors * channels, h, w)`` maps, in float32."""
        levels = [maps[i] for i in self.order]
        if self.num_priors == 1:
            # One copy in all; the last two dimensions are swapped in memory, which no loss minds.
            result = torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)
        else:
            flat = [level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, channels) for level in levels]
            result = torch.cat(flat, 1)
        return result if result.dtype == torch.float64 else result.float()

    def ltrb(self, boxes: Tensor) -> Tensor:
        """Distances in strides from the points to the sides of ``(B, A, 4)`` boxes in pixels."""
        points = self.centers
        return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1) / self.stride_of


@register_reader('mmdet.YOLOXHead')
def read_yolox(head: nn.Module, outputs: Any, *, training: bool) -> DensePredictions:
    """(cls, box, objectness); box is the centre's offset from the point in strides, and log size in strides."""
    scores, boxes, objectness = outputs
    grid = _grid(head, scores)
    box = grid.flatten(boxes, 4)
    offset, half = box[..., :2], box[..., 2:].exp() / 2
    return _predictions(
        grid,
        cls=grid.flatten(scores, head.cls_out_channels),
        activation='sigmoid',
        obj=grid.flatten(objectness, 1),
        ltrb=torch.cat([half - offset, half + offset], -1),
        box=box,
        box_coding='yolox',
    )


@register_reader('mmdet.YOLOV3Head')
def read_yolov3(head: nn.Module, outputs: Any, *, training: bool) -> DensePredictions:
    """One map per level of priors x (x, y, w, h, confidence, classes); x and y are logits inside the cell."""
    (maps,) = outputs
    grid = _grid(head, maps)
    flat = grid.flatten(maps, head.num_attrib)
    box = flat[..., :4]
    decoded = head.bbox_coder.decode(grid.priors, torch.cat([box[..., :2].sigmoid(), box[..., 2:]], -1), grid.stride_of)
    return _predictions(
        grid,
        cls=flat[..., 5:],
        activation='sigmoid',
        obj=flat[..., 4:5],
        ltrb=grid.ltrb(_tensor(decoded)),
        box=box,
        box_coding=f'yolov3 on {_anchor_settings(head)}',
    )


@register_reader('mmdet.RTMDetHead')
@register_reader('mmdet.RTMDetSepBNHead')
def read_rtmdet(head: nn.Module, outputs: Any, *, training: bool) -> DensePredictions:
    """(cls, distances in pixels). Objectness, where built, is already inside cls; distances may be negative."""
    scores, distances = outputs
    _need_coder(head, 'DistancePointBBoxCoder')
    grid = _grid(head, scores)
    return _predictions(
        grid,
        cls=grid.flatten(scores, head.cls_out_channels),
        activation=_activation(head),
        ltrb=grid.flatten(distances, 4) / grid.stride_of,
    )


@register_reader('mmdet.FCOSHead')
def read_fcos(head: nn.Module, outputs: Any, *, training: bool) -> DensePredictions:
    """(cls, distances, centerness). With ``norm_on_bbox`` distances are in strides in training, else in pixels."""
    scores, distances, centerness = outputs
    _need_coder(head, 'DistancePointBBoxCoder')
    grid = _grid(head, scores)
    return _centred(head, grid, scores, centerness, ltrb=_in_strides(head, grid, distances, training))


def _in_strides(head: nn.Module, grid: Any, distances: Any, training: bool) -> Tensor:
    found = grid.flatten(distances, 4)
    return found if head.norm_on_bbox and training else found / grid.stride_of


def _centred(head: nn.Module, grid: Any, scores: Any, centerness: Any, **boxes: Any) -> DensePredictions:
    """Predictions of a head whose scores are weighted by how central a position is."""
    return _predictions(
        grid,
        cls=grid.flatten(scores, head.cls_out_channels),
        activation=_activation(head),
        obj=grid.flatten(centerness, 1),
        obj_coding='centerness',
        **boxes,
    )


@register_reader('mmrotate.RotatedRTMDetHead')
@register_reader('mmrotate.RotatedRTMDetSepBNHead')
def read_rotated_rtmdet(head: nn.Module, outputs: Any, *, training: bool) -> DensePredictions:
    """(cls, distances in pixels along the axes of the box, angles)."""
    scores, distances, _ = outputs
    _need_coder(head, 'DistanceAnglePointCoder')
    grid = _grid(head, scores)
    return _predictions(
        grid,
        cls=grid.flatten(scores, head.cls_out_channels),
        activation=_activation(head),
        box=grid.flatten(distances, 4) / grid.stride_of,
        box_coding=ROTATED,
        **UNREAD,
    )


@register_reader('mmrotate.RotatedFCOSHead')
def read_rotated_fcos(head: nn.Module, outputs: Any, *, training: bool) -> DensePredictions:
    """(cls, distances along the axes of the box, angles, centerness); units as in `read_fcos`."""
    scores, distances, _, centerness = outputs
    _need_coder(head, 'DistanceAnglePointCoder')
    grid = _grid(head, scores)
    box = _in_strides(head, grid, distances, training)
    return _centred(head, grid, scores, centerness, box=box, box_coding=ROTATED, **UNREAD)


@register_reader('mmdet.GFLHead')
def read_gfl(head: nn.Module, outputs: Any, *, training: bool) -> DensePredictions:
    """(cls joint with quality, bin logits of the four distances); a distance is the bins' expectation."""
    scores, bins = outputs
    _need_coder(head, 'DistancePointBBoxCoder')
    grid = _grid(head, scores)
    dist = grid.flatten(bins, 4 * (head.reg_max + 1)).unflatten(-1, (4, head.reg_max + 1))
    # A product and a sum, not a matrix product: autocast would run that one in half precision.
    ltrb = (dist.softmax(-1) * head.integral.project.to(dist)).sum(-1)
    return _predictions(
        grid,
        cls=grid.flatten(scores, head.cls_out_channels),
        activation='sigmoid',
        ltrb=ltrb,
        dist=dist,
    )


@register_reader('mmdet.TOODHead')
def read_tood(head: nn.Module, outputs: Any, *, training: bool) -> DensePredictions:
    """(cls probability, absolute box in strides), in training as in evaluation."""
    scores, boxes = outputs
    grid = _grid(head, scores)
    return _predictions(
        grid,
        cls=grid.flatten(scores, head.cls_out_channels),
        activation='probability',
        ltrb=grid.ltrb(grid.flatten(boxes, 4) * grid.stride_of),
    )


@register_reader('mmdet.ATSSHead')
@register_reader('mmdet.RetinaHead')
@register_reader('mmdet.RetinaSepBNHead')
def read_anchor_deltas(head: nn.Module, outputs: Any, *, training: bool) -> DensePredictions:
    """(cls, deltas on anchors) and, from ATSS, centerness. Decoded by the head's own coder, without clipping."""
    scores, deltas, *centerness = outputs
    coder = head.bbox_coder
    _need_coder(head, *_UPRIGHT, *_ROTATED)
    grid = _grid(head, scores)
    if type(coder).__name__ in _ROTATED:
        box, more = grid.flatten(deltas, 5)[..., :4], UNREAD
    else:
        box = grid.flatten(deltas, 4)
        # The coders take one image's flat list; a batch goes through as one long list.
        anchors = grid.priors.expand(box.shape[0], -1, -1).reshape(-1, 4)
        more = dict(ltrb=grid.ltrb(_tensor(coder.decode(anchors.to(box), box.reshape(-1, 4))).view_as(box)))
    return _predictions(
        grid,
        cls=grid.flatten(scores, head.cls_out_channels),
        activation=_activation(head),
        obj=grid.flatten(centerness[0], 1) if centerness else None,
        obj_coding='centerness',
        box=box,
        box_coding=f'{_coder_settings(coder)} on {_anchor_settings(head)}',
        **more,
    )


#: Coders of deltas on anchors: of upright boxes, and of rotated ones, whose fifth delta is the angle's.
_UPRIGHT = ('DeltaXYWHBBoxCoder', 'DeltaXYWHBBoxCoderForGLIP', 'LegacyDeltaXYWHBBoxCoder', 'TBLRBBoxCoder')
_ROTATED = ('DeltaXYWHTRBBoxCoder', 'DeltaXYWHTHBBoxCoder')


def _predictions(grid: Grid, **fields: Any) -> DensePredictions:
    return DensePredictions(
        level_sizes=grid.sizes,
        strides=grid.strides,
        points=grid.centers,
        num_priors=grid.num_priors,
        **fields,
    )


def _grid(head: nn.Module, maps: Maps) -> Grid:
    """The levels of ``head`` for these output maps.

    Raises:
        DistillError: Strides are not square or repeat, or levels have different numbers of priors.
    """
    sizes = tuple((int(m.shape[-2]), int(m.shape[-1])) for m in maps)
    dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    return _make_grid(type(head).__name__, head.prior_generator, sizes, dtype, maps[0].device)


# Cached: every level takes a dozen small kernels, anchors a copy to the GPU that the host waits for. Room for two heads
# at the sizes of multi-scale training, but not for hundreds of anchor sets (RetinaNet's take 5 MB at 1333 x 800).
@functools.lru_cache(maxsize=32)
def _make_grid(
    name: str, generator: Any, sizes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> Grid:
    pairs = [tuple(float(s) for s in pair) for pair in generator.strides]
    if len(pairs) != len(sizes):
        raise DistillError(f'{name} returned {len(sizes)} levels but has priors for {len(pairs)}.')
    if any(x != y for x, y in pairs):
        raise DistillError(f'{name} has non-square strides {pairs}, which cannot be distilled.')
    counts = sorted(set(generator.num_base_priors))
    if len(counts) != 1:
        raise DistillError(f'{name} has {counts} priors per location in different levels, which cannot be distilled.')
    strides = [x for x, _ in pairs]
    if len(set(strides)) != len(strides):
        raise DistillError(f'{name} has levels of equal stride {strides}, which cannot be distilled.')
    order = tuple(sorted(range(len(strides)), key=strides.__getitem__))
    # Tensors made in inference mode could not be used in a graph later.
    with torch.inference_mode(False):
        found = generator.grid_priors(list(sizes), dtype=dtype, device=device)
        priors = torch.cat([_tensor(found[i]) for i in order])
        lengths = [sizes[i][0] * sizes[i][1] * counts[0] for i in order]
        return Grid(
            order=order,
            sizes=tuple(sizes[i] for i in order),
            strides=tuple(strides[i] for i in order),
            priors=priors,
            num_priors=counts[0],
            # Points, and rotated boxes, begin with their centre.
            centers=(priors[:, :2] + priors[:, 2:]) / 2 if priors.shape[-1] == 4 else priors[:, :2],
            stride_of=torch.cat([priors.new_full((n, 1), strides[i]) for n, i in zip(lengths, order, strict=True)]),
        )


def _activation(head: nn.Module) -> str:
    if getattr(head.loss_cls, 'custom_cls_channels', False):
        raise DistillError(
            f'{type(head).__name__} uses {type(head.loss_cls).__name__}, whose class scores have an activation of '
            f'their own; register a reader for a subclass of the head that applies it.'
        )
    return 'sigmoid' if head.use_sigmoid_cls else 'softmax'


def _need_coder(head: nn.Module, *supported: str) -> None:
    coder = type(head.bbox_coder).__name__
    if coder not in supported:
        raise DistillError(
            f'{type(head).__name__} with bbox_coder {coder} cannot be read, only with {" or ".join(supported)}.'
        )


def _coder_settings(coder: Any) -> str:
    """Name and numbers of a coder; what only concerns clipping and box classes is left out."""
    ignored = ('clip_border', 'use_box_type')
    settings = ', '.join(f'{k}={v}' for k, v in sorted(vars(coder).items()) if k not in ignored)
    return f'{type(coder).__name__}({settings})'


def _anchor_settings(head: nn.Module) -> str:
    """``width x height`` of every base anchor in strides, and its centre in the cell; once if all levels agree."""
    generator = head.prior_generator
    levels = {}
    for (stride, _), anchors in zip(generator.strides, generator.base_anchors, strict=True):
        texts = []
        for x1, y1, x2, y2 in (_tensor(anchors) / stride).tolist():
            centre = (round((x1 + x2) / 2, 3) or 0.0, round((y1 + y2) / 2, 3) or 0.0)
            texts.append(f'{x2 - x1:.4g}x{y2 - y1:.4g}' + ('' if centre == (0, 0) else '@{:g},{:g}'.format(*centre)))
        levels[stride] = ' '.join(texts)
    if len(set(levels.values())) == 1:
        return f'anchors {levels[stride]}'
    return 'anchors ' + ', '.join(f'{s:g}: {levels[s]}' for s in sorted(levels))


def _tensor(boxes: Any) -> Tensor:
    """The tensor in mmdet's box classes (``use_box_type``)."""
    return boxes if isinstance(boxes, Tensor) else boxes.tensor
