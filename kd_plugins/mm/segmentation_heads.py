"""mmseg's decode and auxiliary heads, read into :class:`~kd_plugins.predictions.PixelPredictions`.

Registered by name, so importing this module imports no framework. What a head returns was taken from mmseg 1.2 / OneDL
mmsegmentation 1.4 and is tested against each head's own loss and prediction.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.predictions import PixelPredictions, register_reader, register_unreadable


@register_reader('mmseg.BaseDecodeHead', form=PixelPredictions)
@register_reader('mmseg.BaseCascadeDecodeHead', form=PixelPredictions)
def read_decode_head(head: nn.Module, outputs: Any, *, training: bool) -> PixelPredictions:
    """One map of class logits, as nearly all heads return."""
    if not isinstance(outputs, Tensor):
        count = len(outputs) if isinstance(outputs, (tuple, list)) else 0
        raise DistillError(
            f'{type(head).__name__} returned {count or "no"} tensors instead of one map of class logits; write a '
            f'reader for it (kd_plugins.predictions.register_reader), or tap one of them, e.g. its last layer.'
        )
    return _predictions(head, outputs)


@register_reader('mmseg.DAHead', form=PixelPredictions)
@register_reader('mmseg.EncHead', form=PixelPredictions)
def read_first(head: nn.Module, outputs: Any, *, training: bool) -> PixelPredictions:
    """DANet returns its three branches, EncNet (with the semantic encoding loss) class scores too: the map is first."""
    return _predictions(head, outputs[0] if isinstance(outputs, (tuple, list)) else outputs)


@register_reader('mmseg.DDRHead', form=PixelPredictions)
def read_ddr(head: nn.Module, outputs: Any, *, training: bool) -> PixelPredictions:
    """(context, spatial) in training, the context branch in evaluation: that is what it predicts."""
    return _predictions(head, outputs[0] if training else outputs)


@register_reader('mmseg.PIDHead', form=PixelPredictions)
def read_pid(head: nn.Module, outputs: Any, *, training: bool) -> PixelPredictions:
    """(proportional, integral, derivative) in training, the integral branch in evaluation: that is what it predicts."""
    return _predictions(head, outputs[1] if training else outputs, loss=1)


@register_reader('mmseg.IterativeDecodeHead', form=PixelPredictions)
def read_iterative(head: nn.Module, outputs: Any, *, training: bool) -> PixelPredictions:
    """K-Net: the maps of all stages in training, the last one in evaluation."""
    inner = head.kernel_generate_head
    return _predictions(inner, outputs[-1] if training else outputs)


_MASKS = (
    'it classifies a set of masks, so it has no class logits per pixel. Distil its features instead (e.g. '
    "student='backbone', teacher='backbone' with PearsonLoss), or take a teacher with a per-pixel head, e.g. UPerHead."
)
register_unreadable('mmseg.Mask2FormerHead', _MASKS)
register_unreadable('mmseg.MaskFormerHead', _MASKS)
register_unreadable('mmdet.MaskFormerHead', _MASKS)
register_unreadable('mmseg.SideAdapterCLIPHead', _MASKS)
register_unreadable('mmseg.PointHead', 'it predicts sampled points; tap the stage before it, e.g. decode_head.0.')
register_unreadable('mmseg.STDCHead', 'it predicts edges, not classes; tap decode_head or another auxiliary head.')
register_unreadable('mmseg.VPDDepthHead', 'it predicts depth, not classes; distil its features with FeatureMSELoss.')


def _predictions(head: nn.Module, logits: Any, loss: int = 0) -> PixelPredictions:
    losses = getattr(head, 'loss_decode', None)
    if isinstance(losses, nn.ModuleList):
        losses = losses[loss]
    sigmoid = bool(getattr(losses, 'use_sigmoid', False))
    return PixelPredictions(logits, 'sigmoid' if sigmoid else 'softmax', getattr(head, 'ignore_index', 255))
