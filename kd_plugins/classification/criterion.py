"""What a classifier learns from its labels with."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import DistillError, check_keys, in_words, nearest
from kd_plugins.type_names import type_name


def build_criterion(loss: Any, smoothing: float, multi_label: bool, mixes: bool) -> nn.Module:
    """The loss of a classifier: timm's own, chosen as its training script does, or one that a config names.

    Args:
        loss: See `TimmClassifier`.
        smoothing: Label smoothing.
        multi_label: Whether labels are vectors of zeros and ones.
        mixes: Whether Mixup or CutMix make them soft.

    Raises:
        DistillError: There is no such loss, or it does not suit.
    """
    import timm.loss

    if isinstance(loss, Mapping):
        if smoothing and not mixes:
            raise DistillError(
                f'model.label_smoothing={smoothing} does not reach a loss that is written as dict(type=...); write it '
                'in that dict, or leave loss out.'
            )
        return _configured(loss, mixes)
    if loss not in ('ce', 'bce'):
        raise DistillError(f"model.loss must be 'ce', 'bce' or dict(type=...), got {loss!r}.")
    if multi_label or loss == 'bce':
        # Mixed labels are smoothed where they are mixed.
        amount = 0.0 if mixes else smoothing
        return timm.loss.BinaryCrossEntropy(smoothing=amount, smooth_dense=multi_label and bool(amount))
    if mixes:
        return timm.loss.SoftTargetCrossEntropy()
    if smoothing:
        return timm.loss.LabelSmoothingCrossEntropy(smoothing)
    return nn.CrossEntropyLoss()


def _configured(loss: Mapping[str, Any], mixes: bool) -> nn.Module:
    """The loss that a config names."""
    options = {
        k: torch.tensor(v) if k in ('weight', 'pos_weight') and isinstance(v, (list, tuple)) else v
        for k, v in loss.items()
    }
    name = options.pop('type', None)
    factory = _find_loss(name)
    if mixes and type_name(name) == 'LabelSmoothingCrossEntropy':
        raise DistillError(
            'model.loss LabelSmoothingCrossEntropy takes class numbers, but mixup makes soft labels; leave loss out '
            'and write label_smoothing in the model.'
        )
    if type_name(name) == 'JsdCrossEntropy':
        raise DistillError(
            'model.loss JsdCrossEntropy compares several augmentations of each image (the splits of AugMix), which '
            'the data sets here do not make; leave loss out.'
        )
    taken = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        check_keys(options, taken, f'model.loss ({name})')
    try:
        return factory(**options)
    except Exception as error:  # assertions without a text: timm checks little
        given = ', '.join(f'{k}={v!r}' for k, v in options.items())
        raise DistillError(f'model.loss: {name}({given}) is refused: {in_words(error)}.') from error


def _find_loss(name: Any) -> Callable[..., nn.Module]:
    """A loss of timm, torch or a registry by name; what is no name is one itself."""
    import timm.loss

    factory = getattr(timm.loss, str(name), None) or getattr(nn, str(name), None) if isinstance(name, str) else name
    if isinstance(name, str) and factory is None:
        with ROOT_MODELS.switch_scope_and_registry(None) as registry:
            factory = registry.get(name)
    if factory is None:
        known = [n for m in (timm.loss, nn) for n, c in vars(m).items() if inspect.isclass(c) and _is_loss(m, n)]
        raise DistillError(f'model.loss: there is no loss {name!r}; {nearest(str(name), known)}')
    return factory


def _is_loss(module: Any, name: str) -> bool:
    return module is not nn or name.endswith('Loss')


def check_labels(criterion: nn.Module, count: int | None, multi_label: bool, mixes: bool) -> None:
    """Refuse a loss on other labels than these; some would even broadcast them."""
    if count is None:
        return
    batch = 3 if count == 2 else 2
    logits = torch.zeros(batch, count)
    if multi_label or mixes:
        kind = 'zeros and ones (B, C), as multi_label=True says' if multi_label else 'soft ones (B, C), as mixup makes'
        target = torch.zeros(batch, count).index_fill_(1, torch.tensor([0]), 1)
    else:
        kind, target = 'class numbers (B,)', torch.zeros(batch, dtype=torch.long)
    try:
        with untouched_rng(), torch.no_grad():
            copy.deepcopy(criterion)(logits, target)
    except Exception as error:
        raise DistillError(
            f'model.loss {type(criterion).__name__} fails on {count} logits (B, C) and labels that are {kind}: '
            f'{in_words(error)}; leave loss out for one that suits.'
        ) from error
