"""Running a model of the MM family just far enough for its taps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from kd_plugins.errors import DistillError

_BODY = ('backbone', 'neck')


def run_modules(model: nn.Module, inputs: Any, samples: Any, modules: Sequence[str]) -> None:
    """Compute what the given modules need, without decoding, NMS or losses.

    The data samples are never handed to ``predict``, which writes into them.

    Args:
        model: A detector or segmentor.
        inputs: Its processed batch.
        samples: Data samples, or None.
        modules: Dotted paths of the modules that must run.
    """
    roots = list(dict.fromkeys(path.split('.')[0] for path in modules))
    heads = [root for root in roots if root not in _BODY]
    if not hasattr(model, 'extract_feat'):
        model(inputs, samples, mode='tensor')
        return
    if not heads:
        model.extract_feat(inputs)
        return
    # Segmentors skip auxiliary heads in tensor mode, and RPNs never run there on their own.
    on_features = [h for h in heads if h in ('decode_head', 'auxiliary_head', 'rpn_head')]
    if len(on_features) == len(heads):
        features = model.extract_feat(inputs)
        for name in on_features:
            head = getattr(model, name)
            for module in head if isinstance(head, nn.ModuleList) else [head]:
                module.forward(features)
        return
    try:
        model(inputs, samples, mode='tensor')
    except (TypeError, AttributeError) as error:
        raise DistillError(
            f'{type(model).__name__} cannot be run for the taps {", ".join(map(repr, heads))} '
            f'({type(error).__name__}: {error}); tap its backbone or neck.'
        ) from error
