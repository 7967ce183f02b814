"""Finding and reading configs of the MM family, without MMEngine's hub."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from kd_plugins.errors import DistillError, in_words, nearest
from kd_plugins.type_names import type_name

#: MMEngine's initialiser from a file, by its name in the registry and as a class.
_PRETRAINED = ('Pretrained', 'PretrainedInit')


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
    """The path of a config written as a file or as ``package::relative/path.py``.

    Args:
        text: The spelling.
        where: The option it came from, for error messages.

    Raises:
        DistillError: There is no such file; the nearest ones are named.
    """
    if '::' in text:
        package, _, relative = text.partition('::')
        folder = config_folder(package)
        relative = relative if relative.endswith('.py') else relative + '.py'
        path = folder / relative
        if not path.is_file():
            near = folder / os.path.dirname(relative)
            pool: list[Path] = list(near.glob('*.py')) if near.is_dir() else list(folder.glob('*/*.py'))
            names = [f'{package}::{p.relative_to(folder).as_posix()}' for p in pool]
            raise DistillError(f'{where} {text!r} does not exist; {nearest(text, names)}')
        return str(path)
    path = Path(text).expanduser()
    if not path.is_file():
        pool = list(path.parent.glob('*.py')) if path.parent.is_dir() else []
        raise DistillError(f'{where} {text!r} does not exist; {nearest(text, [p.as_posix() for p in pool])}')
    return str(path)


def load_config(spec: str | Mapping[str, Any], where: str = 'teacher.config') -> Config:
    """Read a config from a path, ``package::path``, a mapping or a ``Config``.

    Raises:
        DistillError: It cannot be found or read, or has no ``model``.
    """
    if isinstance(spec, Config):
        config = spec
    elif isinstance(spec, Mapping):
        config = Config(dict(spec))
    elif isinstance(spec, (str, os.PathLike)):
        path = resolve_config(os.fspath(spec), where)
        try:
            config = Config.fromfile(path)
        except Exception as error:
            base = _package_base(Path(path))
            if base is not None:
                raise DistillError(
                    f'{where} {spec!r}: MMEngine cannot follow _base_ = {base!r} ({in_words(error)}), because it asks '
                    f"pip for the package; write _base_ = __import__('kd_plugins').config({base!r})."
                ) from error
            raise DistillError(f'{where} {spec!r} cannot be read: {type(error).__name__}: {error}') from error
    else:
        raise DistillError(f'{where} must be a config file, got {spec!r}.')
    if not isinstance(config.get('model'), Mapping):
        raise DistillError(f"{where} {_name(spec)} has no 'model'.")
    return config


def _package_base(path: Path, seen: frozenset[Path] = frozenset()) -> str | None:
    """The first ``package::path`` that a config, or one it inherits from, names as its base; None if there is none."""
    try:
        tree = ast.parse(path.read_text(encoding='utf-8'))
    except (OSError, SyntaxError, ValueError):
        return None
    bases = [
        text.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == '_base_' for t in node.targets)
        for text in (node.value.elts if isinstance(node.value, (ast.List, ast.Tuple)) else [node.value])
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
    ]
    for base in bases:
        if '::' in base:
            return base
        inner = (path.parent / base).resolve()
        found = None if inner in seen else _package_base(inner, seen | {inner})
        if found is not None:
            return found
    return None


def _name(spec: Any) -> str:
    return repr(spec) if isinstance(spec, str) else f'(a {type(spec).__name__})'


def plain_model(model: Mapping[str, Any]) -> ConfigDict:
    """The undistilled model config behind one of type ``kd_plugins.Distilled`` (any other is copied as it is)."""
    result = ConfigDict(model).copy()
    # The builder itself is called `distilled`, which is how a pure-Python config names it.
    if type_name(result.get('type')).lower() == 'distilled':
        result['type'] = result.pop('student_type')
        result.pop('distill', None)
    return result


def without_pretrained(config: Any) -> Any:
    """A copy of a model config with no instruction to fetch pretrained weights.

    The teacher's own checkpoint overwrites them, and fetching them needs a network.
    """
    if isinstance(config, Mapping):
        result = {}
        for key, value in config.items():
            if key == 'init_cfg' and isinstance(value, Mapping) and type_name(value.get('type')) in _PRETRAINED:
                continue
            if key == 'pretrained' and (value is True or isinstance(value, str)):
                result[key] = False if value is True else None
                continue
            result[key] = without_pretrained(value)
        return ConfigDict(result)
    if isinstance(config, (list, tuple)):
        return type(config)(without_pretrained(v) for v in config)
    return config
