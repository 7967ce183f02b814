"""The embedded data set: scenes of real handwritten digits, no download needed.

>>> from kd_plugins.lab.data import prepare_digits
>>> root = prepare_digits('data/digits')  # doctest: +SKIP

The layout that is written is described in :mod:`kd_plugins.lab.data.formats`.
"""

from __future__ import annotations

import importlib

from kd_plugins.errors import DistillError
from kd_plugins.extras import how_to_install

_WHERE = {
    'prepare_digits': 'prepare',
    'load_scans': 'scans',
    'split_scans': 'scans',
    'CLASSES': 'scans',
    'Scene': 'scenes',
    'render_scene': 'scenes',
    'IGNORE_INDEX': 'formats',
    'contact_sheet': 'preview',
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> object:
    # Lazy: `import kd_plugins.lab.data` needs neither Pillow nor scikit-learn, which only the demo extra installs.
    if name not in _WHERE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        return getattr(importlib.import_module(f'{__name__}.{_WHERE[name]}'), name)
    except ModuleNotFoundError as error:
        if error.name not in ('PIL', 'numpy'):
            raise
        raise DistillError(
            f'the embedded data set needs {error.name}, which is not installed; {how_to_install("demo")}.'
        ) from error
