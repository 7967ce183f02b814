"""Recipes: one published method a file, as data, the same for MMEngine and Ultralytics.

A recipe is what stands beside ``teacher`` in a distillation: ``terms`` and, where the method says so, ``alpha``,
``start``, ``stop`` and ``stages``. Where a method is used on some kinds of models only, or on each in its own way,
these stand below the name of the task:

.. code-block:: yaml

    # Pixel-wise distillation (arXiv 1903.04197).
    segmentation:
      terms:
        logits: {loss: {type: PixelwiseKLDivLoss}, student: head, teacher: head}

Without such a name they are for every task; a file of one's own is mostly written like that. The first line of a file
is what lists show of it. Neither torch nor a framework is imported here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kd_plugins.config_files import resolve_config
from kd_plugins.errors import DistillError, check_keys, nearest

FOLDER = Path(__file__).parent
TASKS = ('detection', 'segmentation', 'classification')
KEYS = ('terms', 'alpha', 'start', 'stop', 'pseudo_labels', 'stages')
YAML_SUFFIXES = ('.yaml', '.yml')
SUFFIXES = (*YAML_SUFFIXES, '.py')


def names(task: str | None = None) -> list[str]:
    """Names of the recipes of this package, in alphabetical order.

    Args:
        task: Only those for ``'detection'``, ``'segmentation'`` or ``'classification'``. Default: all.
    """
    found = sorted(p.stem for p in FOLDER.glob('*.yaml'))
    return [name for name in found if task is None or task in tasks_of(name)]


def tasks_of(name: str) -> tuple[str, ...]:
    """The tasks that a recipe of this package is for."""
    values = read_yaml(FOLDER / f'{name}.yaml', f'recipe {name!r}')
    return tuple(t for t in TASKS if t in values or not set(TASKS) & set(values))


def description(name: str) -> str:
    """One line on a recipe of this package: the first of its file."""
    return (FOLDER / f'{name}.yaml').read_text(encoding='utf-8').partition('\n')[0].lstrip('# ')


def is_name(text: str | os.PathLike[str]) -> bool:
    """Whether a spelling can only be the name of a recipe, not a file: it has neither a folder nor a suffix."""
    path = Path(text)
    return path.name == os.fspath(text) and not path.suffix and '::' not in path.name


def find_recipe(recipe: str | os.PathLike[str], where: str = 'recipe') -> Path:
    """The file of a recipe.

    Args:
        recipe: A name, or the path of a file of one's own: ``.yaml``, ``.yml``, or for MMEngine ``.py``; also
            ``package::path`` of one that a package ships, e.g. ``kd_plugins::yolo/early.yaml``.
        where: The option it came from, for error messages.

    Raises:
        DistillError: There is none; the nearest ones are named.
    """
    if not isinstance(recipe, (str, os.PathLike)):
        raise DistillError(f'{where} must be the name or the file of a recipe, got {recipe!r}.')
    text = os.fspath(recipe)
    if '::' in text:
        return Path(resolve_config(text, where))
    path = FOLDER / f'{text}.yaml' if is_name(text) else Path(text).expanduser()
    if path.is_file():
        return path
    if is_name(text):
        # A file of one's own needs its suffix.
        own = [f for f in (f'{text}{suffix}' for suffix in SUFFIXES) if Path(f).is_file()]
        raise DistillError(f'{where}: there is no recipe {text!r}; {nearest(text, [*names(), *own])}')
    files = [p.name for p in path.parent.glob('*') if p.suffix.lower() in SUFFIXES]
    near = f'in {str(path.parent)!r}: {nearest(path.name, files)}'
    if not files and path.stem in names():
        near = f'did you mean {path.stem!r}?'
    raise DistillError(f'{where}: the file {text!r} does not exist; {near}')


def load_recipe(recipe: str | os.PathLike[str], task: str, where: str = 'recipe') -> dict[str, Any]:
    """What a recipe says of a task.

    Args:
        recipe: A name, or the path of a YAML file of one's own.
        task: ``'detection'``, ``'segmentation'`` or ``'classification'``.
        where: The option it came from, for error messages.

    Returns:
        ``terms``, and where the recipe has them the other `KEYS`; their values are not checked yet.

    Raises:
        DistillError: There is no such recipe, it cannot be read, has an unknown key, or is not for the task.
    """
    path, name = find_recipe(recipe, where), os.fspath(recipe)
    where = f'recipe {name!r}'
    if path.suffix == '.py':
        raise DistillError(
            f'{where} is a Python config, which only kd-plugins train --kd reads; write its terms in YAML, or inherit '
            'from a config with _base_.'
        )
    values = read_yaml(path, where)
    check_keys(values, (*KEYS, *TASKS), where)
    tasks = [t for t in TASKS if t in values]
    if tasks:
        for key in values:
            if key not in TASKS:
                raise DistillError(f'{where}: {key!r} stands beside {tasks[0]!r}; write it below each task it is for.')
        if task not in tasks:
            fitting = [n for n in names(task) if n != name]
            raise DistillError(f'{where} is for {" and ".join(tasks)}, not for {task}; {nearest(name, fitting)}')
        values, where = values[task], f'{where}, {task}'
        if not isinstance(values, Mapping):
            raise DistillError(f"{where} must be a mapping with 'terms', got {values!r}.")
    check_body(values, where)
    return dict(values)


def check_body(values: Mapping[str, Any], where: str) -> None:
    """Refuse what is no body of a recipe.

    Args:
        values: The body.
        where: What it is, for the message, e.g. ``"recipe 'cwd'"``.

    Raises:
        DistillError: A key is unknown, or there are no terms.
    """
    check_keys(values, KEYS, where)
    if not isinstance(values.get('terms'), Mapping):
        raise DistillError(f"{where} needs 'terms', a mapping of a name to loss, student and teacher.")


def read_yaml(path: str | os.PathLike[str], where: str) -> dict[str, Any]:
    """Read a YAML mapping in which ``1e-3`` is a number, ``None`` is null, and no key is written twice.

    Args:
        path: Of the file.
        where: What it is, for error messages, e.g. ``"recipe 'cwd'"``.

    Returns:
        The content; an empty file is an empty mapping.

    Raises:
        DistillError: It is no YAML file, or not a mapping.
    """
    path = Path(path)
    if path.suffix.lower() not in YAML_SUFFIXES:
        raise DistillError(f'{where} is not a .yaml file.')
    try:
        values = yaml.load(path.read_bytes(), Loader=Loader)
    except yaml.YAMLError as error:
        raise DistillError(f'{where} is not valid YAML: {" ".join(str(error).split())[:200]}') from error
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise DistillError(f'{where} must be a mapping such as "teacher: yolo11x.pt" or "terms: ...".')
    return dict(values)


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's safe loader without three of its traps."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        # The second of two terms of one name would take the place of the first without a word.
        node = super().compose_mapping_node(anchor)
        written = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in written:
                raise yaml.composer.ComposerError(None, None, f'{key.value!r} is written twice', key.start_mark)
            written.add(key.value if isinstance(key.value, str) else id(key))
        return node


# What YAML 1.1 takes for text: it wants a point and a sign, ``1.0e-3``, and ``null``.
Loader.add_implicit_resolver('tag:yaml.org,2002:null', re.compile('^None$'), ['N'])
Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$'), list('-+.0123456789')
)
