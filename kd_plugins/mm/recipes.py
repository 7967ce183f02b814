"""Recipes for models of MMEngine: those of the package, and a user's own as a Python config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS

from kd_plugins.errors import DistillError, in_words
from kd_plugins.recipes import find_recipe, for_task, load_recipe


def read_recipe(recipe: str | os.PathLike, task: str, where: str = 'recipe') -> dict[str, Any]:
    """What a recipe says of a task.

    Args:
        recipe: A name, or a file of one's own: YAML, or a Python config that defines ``terms = dict(...)``.
        task: ``'detection'``, ``'segmentation'`` or ``'classification'``.
        where: The option it came from, for error messages.

    Returns:
        See `load_recipe`.

    Raises:
        DistillError: See `load_recipe`.
    """
    path = find_recipe(recipe, where)
    if path.suffix != '.py':
        return load_recipe(recipe, task, where)
    name = os.fspath(recipe)
    try:
        values = Config.fromfile(path).to_dict()
    except Exception as error:
        raise DistillError(f'recipe {name!r} cannot be read: {in_words(error)}.') from error
    # MMEngine has followed them: the losses may be the user's own.
    values.pop('custom_imports', None)
    return for_task(values, task, name)


def task_of(config: Config) -> str:
    """The task of a plain config's model, by its class; nothing is built.

    Args:
        config: A whole config.

    Raises:
        DistillError: There is no such class.
    """
    from kd_plugins.classification.classifier import TimmClassifier

    kind = config.model.get('type')
    with MODELS.switch_scope_and_registry(config.get('default_scope', 'mmengine')) as registry:
        found = registry.get(kind) if isinstance(kind, str) else kind
    if found is None:
        raise DistillError(
            f'model.type {kind!r} is not registered: it is misspelt, or custom_imports does not name its module.'
        )
    if isinstance(found, type) and issubclass(found, TimmClassifier):
        return 'classification'
    # What every segmentor of mmseg has.
    return 'segmentation' if hasattr(found, 'with_decode_head') else 'detection'


def with_modules(terms: Mapping[str, Any], config: Config, task: str) -> dict[str, Any]:
    """Terms whose ``head`` is the name of the module, which is what taps are."""
    name = {'detection': 'bbox_head', 'segmentation': 'decode_head'}.get(task)
    if name is None or 'head' in config.model:
        return dict(terms)
    return {
        key: {k: name if k in ('student', 'teacher') and v == 'head' else v for k, v in term.items()}
        if isinstance(term, Mapping)
        else term
        for key, term in terms.items()
    }
