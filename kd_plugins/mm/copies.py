"""Copies of data sets and transforms that can be used without touching the originals."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

#: Bytes, or members, from which on a part of a data set is shared with its copy: it is data, and not what changes.
LARGE_ARRAY, LARGE_COLLECTION = 65536, 1000


def private_copy(value: Any) -> Any:
    """A copy of a data set or transform that shares its data, and nothing that changes when it is used (caches)."""
    memo: dict[int, Any] = {}
    _share(value, memo, set())
    return copy.deepcopy(value, memo)


def _share(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Enter into deepcopy's memo what is not to be copied."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (np.ndarray, Tensor, bytes, bytearray)):
        if _bytes(value) >= LARGE_ARRAY:
            memo[id(value)] = value
    elif isinstance(value, nn.Module):
        memo[id(value)] = value
    elif isinstance(value, (dict, list, tuple, set, frozenset)):
        if len(value) >= LARGE_COLLECTION:
            memo[id(value)] = value
            return
        for member in (*value, *value.values()) if isinstance(value, dict) else value:
            _share(member, memo, seen)
    elif hasattr(value, '__dict__') and not isinstance(value, (type, ModuleType)):
        for member in (*vars(value).values(), getattr(value, '__self__', None)):
            _share(member, memo, seen)
    else:
        try:
            copy.deepcopy(value)
        except Exception:  # locks, open files and databases
            memo[id(value)] = value


def _bytes(value: Any) -> int:
    return len(value) if isinstance(value, (bytes, bytearray)) else value.nbytes
