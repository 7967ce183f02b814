"""How timm itself builds the network of a `TimmClassifier`, as a line of Python."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from kd_plugins.classification.classifier import TimmClassifier


def timm_call(model: Mapping[str, Any], weights: str) -> str | None:
    """The call with which timm builds a classifier and loads its weights.

    Args:
        model: The classifier's config, of plain data.
        weights: Where its weights are.

    Returns:
        ``timm.create_model(...)``; None where the network is none of timm's.
    """
    name = model.get('model')
    if not isinstance(name, str):
        return None
    own = inspect.signature(TimmClassifier).parameters
    options = {k: v for k, v in model.items() if k not in own and k != 'type'}
    options |= {k: model[k] for k in ('num_classes', 'in_chans') if model.get(k) is not None}
    size = model.get('input_size')
    if size is not None and 'img_size' not in options and _takes_size(name, options, size):
        options['img_size'] = size
    words = ''.join(f', {key}={value!r}' for key, value in options.items())
    return f'timm.create_model({name!r}{words}, checkpoint_path={weights!r})'


def _takes_size(name: str, options: Mapping[str, Any], size: Any) -> bool:
    """Whether a network is built for one resolution."""
    import timm

    try:
        with torch.device('meta'):
            timm.create_model(name, img_size=size, **options)
    except Exception:
        return False
    return True
