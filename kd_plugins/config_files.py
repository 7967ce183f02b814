"""Finding the configs that packages ship, without MMEngine and without its hub."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from kd_plugins.errors import DistillError, nearest

#: What configs are written in: Python for MMEngine, YAML for Ultralytics.
SUFFIXES = ('.py', '.yaml')


def config_folder(package: str) -> Path:
    """The folder of the configs that an installed package ships.

    ``mmengine.hub`` and ``mim`` also find it, but under the OneDL distributions they install another package first.

    Args:
        package: Import name, e.g. ``'mmdet'``.

    Raises:
        DistillError: The package is not installed or ships no configs.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise DistillError(f'Package {package!r} is not installed, so its configs ({package}::...) cannot be found.')
    root = Path(next(iter(spec.submodule_search_locations)))
    for folder in (root / '.mim' / 'configs', root.parent / 'configs'):
        if folder.is_dir():
            return folder
    raise DistillError(f'Package {package!r} ships no configs; give the path of a config file.')


def resolve_config(text: str, where: str = 'teacher.config') -> str:
    """The path of a config written as a file or as ``package::relative/path.py``; the ``.py`` may be left out.

    Args:
        text: The spelling.
        where: The option it came from, for error messages.

    Raises:
        DistillError: There is no such file; the nearest ones are named.
    """
    if '::' in text:
        package, _, relative = text.partition('::')
        folder = config_folder(package)
        found = next((p for p in (folder / relative, folder / f'{relative}.py') if p.is_file()), None)
        if found is None:
            near = folder / os.path.dirname(relative)
            pool = [p for s in SUFFIXES for p in (near.glob(f'*{s}') if near.is_dir() else folder.glob(f'*/*{s}'))]
            names = [f'{package}::{p.relative_to(folder).as_posix()}' for p in pool]
            raise DistillError(f'{where} {text!r} does not exist; {nearest(text, names)}')
        return str(found)
    path = Path(text).expanduser()
    if not path.is_file():
        pool = list(path.parent.glob('*.py')) if path.parent.is_dir() else []
        raise DistillError(f'{where} {text!r} does not exist; {nearest(text, [p.as_posix() for p in pool])}')
    return str(path)
