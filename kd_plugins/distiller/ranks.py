"""The processes of a run."""

from __future__ import annotations

from torch import Tensor, distributed


def world_size() -> int:
    """How many there are; 1 where nobody started several."""
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if started else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add what every process has, in place and without waiting; all of them must come here."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values
