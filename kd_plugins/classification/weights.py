"""Weights of a classifier under timm's names: in checkpoints, and to start from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.teachers import load_strictly

#: Where `TimmClassifier` holds the network.
NET = 'net.'


def classifier_modules(net: nn.Module) -> list[nn.Module]:
    """The module, or the two of a model with a distillation token, that make logits of features."""
    found = net.get_classifier() if hasattr(net, 'get_classifier') else None
    modules = [m for m in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(m, nn.Module)]
    if not any(True for m in modules for _ in m.parameters()):
        raise DistillError(f'{type(net).__name__} names no classifier; write the path of its last layer instead.')
    return modules


def load_start(net: nn.Module, state: Mapping[str, Tensor], source: str) -> list[str]:
    """Load weights to start from; a classifier with another number of classes stays as it is.

    Args:
        net: The network.
        state: The weights.
        source: Where they come from.

    Returns:
        Keys of the classifier that were left out.

    Raises:
        DistillError: Anything else does not fit.
    """
    own = net.state_dict()
    anew: list[str] = []
    if hasattr(net, 'get_classifier'):
        heads = {id(p) for m in classifier_modules(net) for p in m.parameters()}
        names = [k for k, p in net.named_parameters() if id(p) in heads]
        anew = [k for k in names if k not in state or state[k].shape != own[k].shape]
    rest = OrderedDict((k, v) for k, v in state.items() if k not in anew)
    rest._metadata = getattr(state, '_metadata', None)
    network = 'model.model with its options'
    load_strictly(net, rest, source, allow_missing=anew, architecture=network, where='model.checkpoint')
    return anew


# Functions of this module, so that the EMA's deep copy of the model carries hooks that act on the copy.
def without_prefix(model: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    """State dict hook: keep the network alone, under its own names."""
    for key in [k for k in state if k.startswith(prefix)]:
        # All keys again, so that they keep their order; what is not of the network (a loss's class weights) is config.
        value, name = state.pop(key), key[len(prefix) :]
        if name.startswith(NET):
            state[prefix + name[len(NET) :]] = value


def with_prefix(model: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Load hook: the reverse."""
    _refuse_strangers(model, {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    for key in [k for k in state if k.startswith(prefix)]:
        state[f'{prefix}{NET}{key[len(prefix) :]}'] = state.pop(key)
    for name, value in model.criterion.state_dict(prefix=f'{prefix}criterion.').items():
        state[name] = value


def _refuse_strangers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """MMEngine's ``load_from`` only warns of what does not fit, and trains on from random weights."""
    # Counters and other scalars look alike everywhere.
    own = {k: v.shape for k, v in model.net.state_dict().items() if v.dim()}
    if state and not any(own[k] == getattr(v, 'shape', None) for k, v in state.items() if k in own):
        raise DistillError(
            f'The checkpoint to load does not fit {model.model_name} at all: it holds {", ".join(list(state)[:3])}, '
            f'... where {", ".join(list(own)[:3])}, ... are expected; check load_from, the model and its options.'
        )
