"""Where a teacher comes from: one module per kind of model, chosen by a key of the ``teacher`` mapping.

``teacher=dict(config='mmdet::...', checkpoint='x.pth')``, ``dict(ultralytics='x.pt')``, ``dict(timm='resnet50',
checkpoint='x.pth')`` and so on name teachers for students of any framework; of ``dict(checkpoint='x.pth.tar')`` alone
the file is asked (`kd_plugins.teachers.recognition`). A module of this package says with
`register_teacher` which key it is for; nothing else has to know it. The frameworks' sub-packages must not import each
other, so theirs are registered below by the *name* of the module, which is imported when a teacher asks for it. It has

- ``find(cfg) -> dict``: refuse what is misspelt or missing without loading anything, and make paths absolute
  (processes on several GPUs start in another folder);
- ``build(cfg, student) -> (Teacher, notes)``: load it. ``student`` is the `PixelFormat` of the batches it will get.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from kd_plugins.distiller.protocol import Teacher
from kd_plugins.errors import DistillError, shown
from kd_plugins.extras import how_to_install
from kd_plugins.teachers.pixels import PixelFormat

_SOURCES: dict[str, tuple[str, str]] = {}


def register_teacher(key: str, module: str, example: str) -> None:
    """Make a kind of teacher known.

    Args:
        key: The key of the ``teacher`` mapping that selects it.
        module: Dotted name of the module with ``find`` and ``build``; ``__name__`` in that module itself.
        example: How to write it, for messages.
    """
    _SOURCES[key] = (module, example)


register_teacher('config', 'kd_plugins.mm.source', "dict(config='mmdet::...', checkpoint='x.pth')")
register_teacher('ultralytics', 'kd_plugins.yolo.source', "dict(ultralytics='x.pt')")


#: Exported programs, and files of weights, which say more or less of their network.
EXPORTED = ('.pt2', '.torchscript')
WEIGHTS = ('.pth', '.pth.tar', '.tar', '.safetensors', '.bin')


def of_file(path: str) -> dict[str, Any] | None:
    """The ``teacher`` mapping of a bare file that holds a whole model or weights; None: its name does not end so."""
    for endings, key in ((EXPORTED, 'exported'), (WEIGHTS, 'checkpoint'), ('.pt', 'ultralytics')):
        if path.endswith(endings):
            return {key: path}
    return None


def teacher_kind(cfg: Any) -> str | None:
    """The key of a ``teacher`` mapping that says what kind it is; None when there is none.

    Raises:
        DistillError: There are two.
    """
    found = [k for k in _sources() if isinstance(cfg, Mapping) and cfg.get(k) is not None]
    if len(found) > 1:
        raise DistillError(f'teacher must be one model, got both {found[0]!r} and {found[1]!r}.')
    return found[0] if found else None


def find_source(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Check a ``teacher`` mapping before anything is loaded; paths become absolute.

    Raises:
        DistillError: It is misspelt, files are missing, or its framework is not installed.
    """
    return _call('find', cfg)


def build_source(cfg: Mapping[str, Any], student: PixelFormat) -> tuple[Teacher, list[str]]:
    """Load the teacher of a ``teacher`` mapping.

    Args:
        cfg: The mapping.
        student: What the batches look like that it will be given.

    Returns:
        The teacher and notes for the summary.

    Raises:
        DistillError: It cannot be loaded.
    """
    return _call('build', cfg, student)


def _sources() -> Mapping[str, tuple[str, str]]:
    _register_own()
    return _SOURCES


@functools.cache
def _register_own() -> None:
    """Import the modules of this package, in which the kinds of teachers register themselves; no framework is."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f'{__package__}.{module.name}')


def _call(function: str, cfg: Mapping[str, Any], *rest: Any) -> Any:
    kind = teacher_kind(cfg)
    if kind is None and isinstance(cfg, Mapping) and cfg.get('checkpoint'):
        recognition = importlib.import_module('kd_plugins.teachers.recognition')
        # Anything else is a key that was meant to say the kind.
        if set(cfg) <= set(recognition.KEYS):
            cfg = recognition.recognise(cfg)
            kind = teacher_kind(cfg)
    if kind is None:
        examples = ', '.join(example for _, example in _sources().values())
        if not isinstance(cfg, Mapping):
            raise DistillError(f'teacher must be one of {examples}; got {shown(cfg)}.')
        raise DistillError(f'teacher must be one of {examples}; got the keys {sorted(map(str, cfg)) or "none"}.')
    try:
        return getattr(importlib.import_module(_sources()[kind][0]), function)(cfg, *rest)
    except ImportError as error:
        package = (error.name or '').split('.')[0]
        if package not in _EXTRAS:
            raise
        raise DistillError(
            f'teacher=dict({kind}=...) needs {package!r}, which is not installed; {how_to_install(_EXTRAS[package])}.'
        ) from error


_EXTRAS = {'mmengine': 'mm', 'mmcv': 'mm', 'mmdet': 'mm', 'ultralytics': 'yolo', 'timm': 'timm', 'torchvision': 'timm'}
