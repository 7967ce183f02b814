"""Shared by the adapters."""

from __future__ import annotations

from torch import nn


def count(module: nn.Module) -> str:
    """Number of parameters, short: ``'960'``, ``'24.8k'``, ``'1.2M'``."""
    number = sum(p.numel() for p in module.parameters())
    # 999,950 and up would round to '1000.0k'.
    if number >= 999_950:
        return f'{number / 1e6:.1f}M'
    return f'{number / 1e3:.1f}k' if number >= 1000 else str(number)
