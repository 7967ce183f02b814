"""Reading configs of the MM family, without MMEngine's hub."""

from __future__ import annotations

import ast
import copy
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from kd_plugins.config_files import resolve_config
from kd_plugins.errors import DistillError, in_words
from kd_plugins.extras import how_to_install, requirements
from kd_plugins.type_names import type_name

#: MMEngine's initialiser from a file, by its name in the registry and as a class.
_PRETRAINED = ('Pretrained', 'PretrainedInit')


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
            raise missing(error, f'{where} {spec!r}') or DistillError(
                f'{where} {spec!r} cannot be read: {type(error).__name__}: {error}'
            ) from error
    else:
        raise DistillError(f'{where} must be a config file, got {spec!r}.')
    if not isinstance(config.get('model'), Mapping):
        raise DistillError(f"{where} {_name(spec)} has no 'model'.")
    return config


def missing(error: BaseException, what: str, scope: str | None = None) -> DistillError | None:
    """Says which package is not installed, where that is what an error comes from.

    Args:
        error: What came of reading a config, or of building what it describes.
        what: The config, in words.
        scope: Its ``default_scope``, which is the package that has its models registered.

    Returns:
        The error to raise in its place; None: it comes from something else.
    """
    package = None
    cause: BaseException | None = error
    while cause is not None and package is None:
        package = cause.name if isinstance(cause, ModuleNotFoundError) else None
        cause = cause.__cause__ or cause.__context__
    # A scope may also be that of a registry of the user's own.
    if package is None and scope and isinstance(error, KeyError) and scope not in MODELS.children:
        package = scope if importlib.util.find_spec(scope) is None else None
    if package is None:
        return None
    package = package.partition('.')[0]
    how = f'; {how_to_install(package)}' if requirements(package) else ''
    return DistillError(f'{what} needs {package}, which is not installed{how}.')


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


def remove_distillation(config: Config) -> None:
    """Turn a distilled config into the plain student's, in place."""
    config.model = plain_model(config.model)
    hooks = config.get('default_hooks')
    if hooks and 'distill' in hooks:
        config.default_hooks = {k: v for k, v in hooks.items() if k != 'distill'}


def merge_options(config: Config, options: Mapping[str, Any] | None, *, tested: bool = False) -> None:
    """Apply ``key=value`` overrides, in place.

    Args:
        config: Changed.
        options: By dotted key.
        tested: Whether the config is to measure a checkpoint: one with a validation and no test gets that as its test.
    """
    options = options or {}  # merging nothing would still copy the config
    last = {key: value for key, value in options.items() if tested and key.partition('.')[0].startswith('test_')}
    first = {key: value for key, value in options.items() if key not in last}
    if first:
        config.merge_from_dict(first)
    if tested and config.get('val_evaluator') is not None and config.get('val_dataloader') is not None:
        for key, default in (
            ('test_dataloader', config.val_dataloader),
            ('test_evaluator', config.val_evaluator),
            ('test_cfg', ConfigDict()),
        ):
            if config.get(key) is None:
                config[key] = copy.deepcopy(default)
    if last:
        config.merge_from_dict(last)


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
