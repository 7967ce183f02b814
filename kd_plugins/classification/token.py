"""Networks with a distillation token: timm's ``set_distilled_training``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def find_token(net: nn.Module) -> str | None:
    """Path of the module that returns the logits of two heads in distilled training; None without a token.

    Some families have the switch in every model, but a second head in some only.
    """
    if not hasattr(net, 'set_distilled_training'):
        return None
    for path, module in net.named_modules():
        if not hasattr(module, 'distilled_training'):
            continue
        heads = [getattr(module, name, None) for name in ('head_dist', 'heads_dist')]
        if getattr(module, 'distillation', True) and any(
            h is not None and not isinstance(h, nn.Identity) for h in heads
        ):
            return path
    return None


@contextmanager
def returning_both(owner: nn.Module) -> Iterator[None]:
    """Let a network return ``(class logits, distillation logits)`` instead of their mean, in evaluation as well.

    Only the flags of the module that returns them are set: its layers keep their mode.
    """
    modes = owner.distilled_training, owner.training
    owner.distilled_training, owner.training = True, True
    try:
        yield
    finally:
        owner.distilled_training, owner.training = modes
