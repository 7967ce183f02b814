"""All labs by name, as far as their frameworks are installed, and tests once for every case in them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

#: Where the lab of every kind of model is, and the framework it needs.
PLACES = {
    'detection': ('lab', 'Lab', 'mmengine'),
    'segmentation': ('seg_lab', 'SegLab', 'mmengine'),
    'classification': ('cls_lab', 'ClsLab', 'mmengine'),
    'yolo': ('yolo_lab', 'YoloLab', 'ultralytics'),
}
LABS = {
    name: getattr(importlib.import_module(f'tests.integration.{module}'), cls)
    for name, (module, cls, framework) in PLACES.items()
    if importlib.util.find_spec(framework)
}
#: ``{lab: {promise: {name: case}}}``.
KEEPS = {name: importlib.import_module(f'tests.integration.cases.{name}').KEEPS for name in LABS}


def kept(promise: str) -> Callable[[Any], Any]:
    """Collect a test once for every case of every lab that keeps a promise, as ``lab`` and ``case``.

    Args:
        promise: A key of ``KEEPS`` in tests/integration/cases.
    """
    found = [
        pytest.param(name, case, id=f'{name}: {key}', marks=pytest.mark.long if case.long else ())
        for name, keeps in KEEPS.items()
        for key, case in keeps.get(promise, {}).items()
    ]
    return pytest.mark.parametrize(('lab', 'case'), found, indirect=['lab']) if found else lambda test: None
