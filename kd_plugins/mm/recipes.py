"""Recipes for models of MMEngine: those of the package, and a user's own as a Python config."""

from __future__ import annotations

import os
from typing import Any

from mmengine.config import Config

from kd_plugins.errors import DistillError, in_words
from kd_plugins.recipes import check_body, find_recipe, load_recipe


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
