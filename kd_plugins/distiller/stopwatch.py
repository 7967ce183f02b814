"""How long teachers take, measured in the run itself without making anybody wait."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Batches that are not measured, in which memory is found and kernels are chosen, and those that are.
SKIPPED, MEASURED = 3, 20


class Stopwatch:
    """Seconds of what runs once per batch, by name.

    On a GPU the work is only queued when the host goes on: events in its queue tell the time, and are asked for it at
    the end.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._spans: dict[str, list[Any]] = {}

    @contextmanager
    def measure(self, name: str, device: str) -> Iterator[None]:
        """Measure what happens inside.

        Args:
            name: What it is.
            device: Type of the device that it runs on.
        """
        self._seen[name] = self._seen.get(name, 0) + 1
        if not SKIPPED < self._seen[name] <= SKIPPED + MEASURED:
            yield
            return
        spans = self._spans.setdefault(name, [])
        if device == 'cuda':  # pragma: no cover - needs a GPU
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            spans.append((start, end))
            return
        began = time.perf_counter()
        yield
        spans.append(time.perf_counter() - began)

    def medians(self) -> dict[str, float]:
        """Median seconds per batch, of what ran often enough; waits for the GPU."""
        return {name: statistics.median(map(_seconds, spans)) for name, spans in self._spans.items()}


def _seconds(span: Any) -> float:
    if isinstance(span, float):
        return span
    start, end = span  # pragma: no cover - needs a GPU
    end.synchronize()  # pragma: no cover - needs a GPU
    return start.elapsed_time(end) / 1000  # pragma: no cover - needs a GPU
