"""mmdet's dense heads, read into :class:`~kd_plugins.predictions.DensePredictions`.

Registered by name, so importing this module imports no framework; coders and prior generators are used through
the head. What a head's numbers mean was taken from mmdet 3.3 / OneDL mmdetection 3.5 and is tested against each
head's own ``predict_by_feat``. All decoding is in float32 and differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.predictions import DensePredictions, register_reader

Maps = Sequence[Tensor]  # one (B, channels, h, w) map per level


class Grid(NamedTuple):
    """The levels of one head on one input, in ascending order of stride.

    Attributes:
        order: Index of every level in the head's own order (YOLOv3 goes from coarse to fine).
        sizes: ``(h, w)`` of every level.
        strides: Stride of every level in pixels.
        priors: ``(A, 2)`` points or ``(A, 4)`` anchor boxes, in pixels, float32.
        num_priors: Priors per location.
    """

    order: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    strides: tuple[float, ...]
    priors: Tensor
    num_priors: int

    @property
    def stride_of(self) -> Tensor:
        """``(A, 1)`` stride of every position."""
        lengths = [h * w * self.num_priors for h, w in self.sizes]
        return torch.cat([self.priors.new_full((n, 1), s) for n, s in zip(lengths, self.strides, strict=True)])

    @property
    def centers(self) -> Tensor:
        """``(A, 2)`` points, or the anchors' centres."""
        return self.priors if self.priors.shape[-1] == 2 else (self.priors[:, :2] + self.priors[:, 2:]) / 2

    def flatten(self, maps: Maps, channels: int) -> Tensor:
        """``(B, A, channels)`` of per-level ``(B, num_priors * channels, h, w)`` maps, in float32."""
        flat = []
        for i in self.order:
            level = maps[i]
            flat.append(level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, channels))
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
    ltrb = grid.flatten(distances, 4)
    in_strides = head.norm_on_bbox and training
    return _predictions(
        grid,
        cls=grid.flatten(scores, head.cls_out_channels),
        activation=_activation(head),
        obj=grid.flatten(centerness, 1),
        obj_coding='centerness',
        ltrb=ltrb if in_strides else ltrb / grid.stride_of,
    )


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
    _need_coder(head, 'DeltaXYWHBBoxCoder', 'DeltaXYWHBBoxCoderForGLIP', 'LegacyDeltaXYWHBBoxCoder', 'TBLRBBoxCoder')
    grid = _grid(head, scores)
    box = grid.flatten(deltas, 4)
    # The coders take one image's flat list; a batch goes through as one long list.
    anchors = grid.priors.expand(box.shape[0], -1, -1).reshape(-1, 4)
    decoded = _tensor(coder.decode(anchors.to(box), box.reshape(-1, 4))).view_as(box)
    return _predictions(
        grid,
        cls=grid.flatten(scores, head.cls_out_channels),
        activation=_activation(head),
        obj=grid.flatten(centerness[0], 1) if centerness else None,
        obj_coding='centerness',
        ltrb=grid.ltrb(decoded),
        box=box,
        box_coding=f'{_coder_settings(coder)} on {_anchor_settings(head)}',
    )


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
    generator = head.prior_generator
    name = type(head).__name__
    pairs = [tuple(float(s) for s in pair) for pair in generator.strides]
    if len(pairs) != len(maps):
        raise DistillError(f'{name} returned {len(maps)} levels but has priors for {len(pairs)}.')
    if any(x != y for x, y in pairs):
        raise DistillError(f'{name} has non-square strides {pairs}, which cannot be distilled.')
    counts = sorted(set(generator.num_base_priors))
    if len(counts) != 1:
        raise DistillError(f'{name} has {counts} priors per location in different levels, which cannot be distilled.')
    strides = [x for x, _ in pairs]
    if len(set(strides)) != len(strides):
        raise DistillError(f'{name} has levels of equal stride {strides}, which cannot be distilled.')
    order = tuple(sorted(range(len(strides)), key=strides.__getitem__))
    sizes: list[tuple[int, int]] = [(int(m.shape[-2]), int(m.shape[-1])) for m in maps]
    dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    priors = generator.grid_priors(sizes, dtype=dtype, device=maps[0].device)
    return Grid(
        order=order,
        sizes=tuple(sizes[i] for i in order),
        strides=tuple(strides[i] for i in order),
        priors=torch.cat([_tensor(priors[i]) for i in order]),
        num_priors=counts[0],
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
