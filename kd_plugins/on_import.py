"""Completes one module of Ultralytics, now or when it is imported; imports nothing itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

#: The module whose ``default_callbacks`` every new model and trainer copies.
MODULE = 'ultralytics.utils.callbacks.base'
#: Environment variable that names a kd.yaml: trainings of Ultralytics distil by it.
VARIABLE = 'KD_PLUGINS_YOLO'
#: Names a file to which a training that was distilled because of `VARIABLE` adds a line at its end.
REPORT = 'KD_PLUGINS_YOLO_REPORT'


def complete_callbacks(complete: Callable[[Any], None]) -> None:
    """Let a function complete the module with Ultralytics' default callbacks.

    Args:
        complete: Is given the module, at once or as soon as something imports it.
    """
    if MODULE in sys.modules:
        complete(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _Hook(complete))


class _Hook:
    """A finder that finds nothing itself: it completes one module after its own loader has executed it."""

    def __init__(self, complete: Callable[[Any], None]) -> None:
        self.complete = complete

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != MODULE:
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self.complete(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
