"""Shared by the adapters."""

from __future__ import annotations

from torch import nn

from kd_plugins.errors import DistillError


def count(module: nn.Module) -> str:
    """Number of parameters, short: ``'960'``, ``'24.8k'``, ``'1.2M'``."""
    number = sum(p.numel() for p in module.parameters())
    # 999,950 and up would round to '1000.0k'.
    if number >= 999_950:
        return f'{number / 1e6:.1f}M'
    return f'{number / 1e3:.1f}k' if number >= 1000 else str(number)


def check_integers(owner: str, minimum: int, **values: object) -> None:
    """Refuse values that are no integers of at least ``minimum``.

    Args:
        owner: Whose options they are, for the message.
        minimum: Smallest valid value.
        **values: The values by option name.

    Raises:
        DistillError: The first value that is wrong.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise DistillError(f'{owner}: {name} must be an integer >= {minimum}, got {value!r}.')


def check_switches(owner: str, **values: object) -> None:
    """Refuse values that are neither True nor False; as `check_integers`."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise DistillError(f'{owner}: {name} must be True or False, got {value!r}.')
