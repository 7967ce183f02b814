"""Where the stages of a classifier end, whoever wrote it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from kd_plugins.errors import DistillError

# Which of several outputs is the map: PiT's stages return it with class tokens, TNT's blocks pixels, then patches.
_OUTPUT = {'PoolingVisionTransformer': 0, 'TNT': 1}
# Hiera keeps its tokens in the order in which it pools them: they would pass for a map with every patch misplaced.
_NO_MAPS = ('Hiera',)
_STAGE = re.compile(r'(layer|stage)_?\d+')
_GROUPS = 4


def stages(net: nn.Module) -> list[str]:
    """The stages of a classifier as taps, relative to it.

    timm networks say themselves where their stages end (``feature_info``); those with one grid throughout, as ViTs and
    Mixers, name every block there and have four stages of equal depth here. Of others, these are recognised:
    ``encoder.layers`` (torchvision's ViTs, four stages as well), a sequence ``features`` or ``trunk_output``, which is
    cut before everything that has a stride, and children ``layer1``, ``layer2``, ... or ``stage1``, ... (ResNets).

    Args:
        net: The plain network; not run.

    Returns:
        Spellings for `Tap.parse`, shallow to deep: module paths, with an index where a module has several outputs
        (``'transformers.0[0]'``).

    Raises:
        DistillError: They cannot be told; the children of the network are named.
    """
    name = type(net).__name__
    found = [] if name in _NO_MAPS else _find(net)
    # One module for several stages returns all of them at once (CoaT, CrossViT).
    if not found or len(set(found)) < len(found):
        children = ', '.join(repr(child) for child, _ in net.named_children())
        first = next((child for child, _ in net.named_children()), 'layer')
        raise DistillError(
            f"The stages of {name} cannot be told from its children {children}; tap a module of it, e.g. 'net.{first}'."
        )
    return [f'{path}[{_OUTPUT[name]}]' for path in found] if name in _OUTPUT else found


def _find(net: nn.Module) -> list[str]:
    modules = dict(net.named_modules())
    info = _feature_info(net)
    # Some of timm's names are only those of the network's feature extractor; '' is the network itself.
    named = [entry['module'] for entry in info if entry.get('module') and entry['module'] in modules]
    if named:
        return _groups(named) if len({entry.get('reduction') for entry in info}) == 1 else named
    if 'encoder.layers' in modules:
        return _groups(_children(modules, 'encoder.layers'))
    for path in ('features', 'trunk_output'):
        if path in modules:
            return _before_strides(modules, _children(modules, path))
    for path in ('stages', 'blocks'):
        # MViT and Twins, whose feature_info says 'block'. A list does not run itself; the last of its members does.
        if info and path in modules:
            return [_last_member(modules, stage) for stage in _children(modules, path)]
    return [child for child, _ in net.named_children() if _STAGE.fullmatch(child)]


def _feature_info(net: nn.Module) -> Sequence[Mapping[str, Any]]:
    info = getattr(net, 'feature_info', None) or ()
    info = getattr(info, 'info', info)
    return info if all(isinstance(entry, Mapping) for entry in info) else ()


def _children(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    return [f'{path}.{name}' for name, _ in modules[path].named_children()]


def _groups(blocks: Sequence[str]) -> list[str]:
    """The last block of each quarter."""
    count = min(_GROUPS, len(blocks))
    return [blocks[len(blocks) * (i + 1) // count - 1] for i in range(count)]


def _last_member(modules: Mapping[str, nn.Module], path: str) -> str:
    while isinstance(modules[path], nn.ModuleList):
        path = _children(modules, path)[-1]
    return path


def _before_strides(modules: Mapping[str, nn.Module], members: Sequence[str]) -> list[str]:
    ends = [now for now, after in pairwise(members) if _has_stride(modules[after])]
    return [*ends, *members[-1:]]


def _has_stride(module: nn.Module) -> bool:
    # Swin's patch merging slices.
    return any('Merging' in type(m).__name__ or _is_more_than_one(getattr(m, 'stride', 1)) for m in module.modules())


def _is_more_than_one(stride: object) -> bool:
    return any(isinstance(s, int) and s > 1 for s in (stride if isinstance(stride, Sequence) else (stride,)))
