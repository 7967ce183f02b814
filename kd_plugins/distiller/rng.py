"""Random generators that stay as they were found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Leave every random generator (torch CPU and CUDA, numpy, random) as it was found.

    Building a teacher and the start-up dry run draw random numbers; without this, a distilled run would start from
    other student weights and shuffles than the plain run with the same seed.
    """
    import random

    import numpy

    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)
