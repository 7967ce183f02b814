"""From what a term says of its adapters to modules for the features at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kd_plugins.adapters as adapters
from kd_plugins.adapters import AdapterChain, adapt, auto_adapter, traits_of
from kd_plugins.distiller.terms import Resolver, automatic, build_named


def build_adapter(
    cfg: Any,
    ours: Tensor,
    theirs: Tensor,
    where: str,
    resolve: Resolver | None = None,
    *,
    channels: bool = True,
    image_size: Sequence[int] | None = None,
) -> nn.Module | None:
    """Build the adapter of one level.

    Args:
        cfg: None, ``'auto'``, ``dict(type=...)``, or a list of these, one after the other: each is built for what the
            one before makes of the features, so ``'auto'`` may stand anywhere.
        ours: Features that are adapted, of any shape.
        theirs: Those they are brought to.
        where: What it is, for error messages.
        resolve: Looks names up that are not ours.
        channels: What ``'auto'`` does, see `auto_adapter`.
        image_size: ``(H, W)`` of the images in pixels, for adapters that need it. Default: not known.

    Returns:
        The adapter, on no device in particular; None where nothing is to be done.

    Raises:
        DistillError: There is no such adapter, or it does not fit.
    """
    chain = isinstance(cfg, (list, tuple))
    parts = list(cfg) if chain else [cfg]
    built: list[nn.Module] = []
    for i, part in enumerate(parts):
        options = automatic(part)
        adapter: nn.Module | None
        if options:
            options = {k: v for k, v in options.items() if k != 'prefix_tokens'}
            adapter = auto_adapter(tuple(ours.shape), tuple(theirs.shape), channels=channels, **options)
        elif part is None:
            adapter = None
        else:
            adapter = build_named(part, adapters, f'{where}[{i}]' if chain else where, 'adapter', resolve)
        if adapter is None:
            continue
        adapter = traits_of(adapter).for_shapes(tuple(ours.shape), tuple(theirs.shape))
        built.append(adapter)
        if i + 1 < len(parts):
            with torch.no_grad():
                # As it is in evaluation: running statistics are those of the training alone.
                ours = adapt(adapter.to(ours.device).eval(), ours, theirs, image_size)
            adapter.train()
    if not built:
        return None
    return AdapterChain(*built) if chain else built[0]
