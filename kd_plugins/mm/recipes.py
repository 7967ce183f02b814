"""Recipes for models of MMEngine: those of the package, and a user's own as a Python config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config

from kd_plugins.distiller.terms import loss_parameters
from kd_plugins.errors import DistillError, in_words
from kd_plugins.recipes import check_body, find_recipe, load_recipe
from kd_plugins.recipes.options import apply_options, load_recipes, read_words, split_recipes


def read_recipe(recipe: str | os.PathLike, task: str, where: str = 'recipe') -> dict[str, Any]:
    """What a recipe says of a task; as `load_recipe`, but it may also be a Python config.

    Args:
        recipe: A name, or a file of one's own.
        task: ``'detection'``, ``'segmentation'`` or ``'classification'``.
        where: The option it came from, for error messages.

    Raises:
        DistillError: See `load_recipe`.
    """
    if find_recipe(recipe, where).suffix == '.py':
        return read_python(recipe)
    return load_recipe(recipe, task, where)


def read_recipes(recipe: str, task: str, words: Sequence[str] = (), where: str = '--kd') -> dict[str, Any]:
    """What one or several recipes say of a task, with changes, see `kd_plugins.recipes.options`.

    Args:
        recipe: Names or files, with commas between them.
        task: ``'detection'``, ``'segmentation'`` or ``'classification'``.
        words: Changes, ``'weight=3'``.
        where: The option the recipes came from, for error messages.

    Returns:
        As `load_recipe`; ``teacher`` holds what is changed of the teacher.

    Raises:
        DistillError: See `load_recipe`; or there is nothing of a name that is changed.
    """
    changes = read_words(words)
    body = load_recipes([read_recipe(r, task, where) for r in split_recipes(recipe)], task, where, changes)
    return apply_options({**body, 'teacher': {}}, changes, loss_parameters(), '--kd-options') if words else body


def read_python(recipe: str | os.PathLike) -> dict[str, Any]:
    """What a Python config says that defines ``terms = dict(...)``, and perhaps ``alpha``, ``start`` and ``stop``.

    Args:
        recipe: The file.

    Raises:
        DistillError: It cannot be read, or is no recipe.
    """
    where = f'recipe {os.fspath(recipe)!r}'
    try:
        values = Config.fromfile(find_recipe(recipe)).to_dict()
    except Exception as error:
        raise DistillError(f'{where} cannot be read: {in_words(error)}.') from error
    # MMEngine has followed them: the losses may be the user's own.
    values.pop('custom_imports', None)
    check_body(values, where)
    return values
