"""Recipes by name, the kd.yaml that a user writes, and the one that a run leaves beside its args.yaml."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kd_plugins.errors import DistillError, check_keys
from kd_plugins.recipes import TASKS, find_recipe, is_name, read_yaml
from kd_plugins.yolo.options import DistillOptions

FILE = 'kd.yaml'


def read_recipe(recipe: str | os.PathLike) -> dict[str, Any]:
    """The options that a recipe sets.

    Args:
        recipe: The name of a recipe of the package, or a file: a kd.yaml, or a recipe of one's own with a body for each
            task. A relative ``teacher`` in it is relative to the working folder, as every path of Ultralytics.

    Returns:
        The options; their values are not checked yet. What is a body for each task is left to the ``recipe`` option,
        as the task is not known here.

    Raises:
        DistillError: There is no such recipe, it is not a YAML mapping, or has an unknown key.
    """
    path = find_recipe(recipe, 'kd')
    if is_name(recipe):
        return {'recipe': str(recipe)}
    where = f'recipe {str(recipe)!r}'
    values = read_yaml(path, where)
    if set(TASKS) & set(values):
        return {'recipe': str(path.absolute())}
    check_keys([str(k) for k in values], DistillOptions.names(), where)
    return values


def task_of(name: str) -> str:
    """What recipes call a task of Ultralytics."""
    return 'classification' if name == 'classify' else 'detection'


def read_options(path: str | os.PathLike) -> DistillOptions:
    """The checked options of a kd.yaml.

    Raises:
        DistillError: See `read_recipe` and `DistillOptions`.
    """
    return DistillOptions.from_dict(read_recipe(path), f'recipe {str(path)!r}')


def recipe_of_run(checkpoint: str | os.PathLike) -> str:
    """The kd.yaml of the run that wrote a checkpoint.

    It is looked for in the folder where the checkpoint is (a run that was moved) and where the run was.

    Args:
        checkpoint: A ``last.pt``.

    Raises:
        DistillError: The checkpoint or the kd.yaml is gone.
    """
    checkpoint = Path(checkpoint).expanduser().absolute()
    if not checkpoint.is_file():
        raise DistillError(
            f'resume needs the checkpoint, and {str(checkpoint)!r} does not exist; write '
            'resume model=path/to/weights/last.pt.'
        )
    folders = [checkpoint.parent.parent if checkpoint.parent.name == 'weights' else checkpoint.parent]
    if not (folders[0] / FILE).is_file():
        folders += _recorded_folder(checkpoint)
    for folder in folders:
        if (folder / FILE).is_file():
            return str(folder / FILE)
    raise DistillError(
        f'the run in {str(folders[-1])!r} has no {FILE}, so how it was distilled is not known; restore the file or '
        f'name one with kd=path/to/{FILE} (a run without distillation: yolo train resume model=...).'
    )


def write_recipe(path: str | os.PathLike, options: DistillOptions) -> None:
    """Record the options of a run; a file that says the same, perhaps with comments, is left alone."""
    from ultralytics.utils import YAML

    path = Path(path)
    try:
        same = read_options(path).to_dict() == options.to_dict()
    except DistillError:
        same = False
    if not same:
        YAML.save(path, options.to_dict())


def _recorded_folder(checkpoint: Path) -> list[Path]:
    """The folder of the run that the checkpoint remembers, if any."""
    from ultralytics.nn.tasks import load_checkpoint

    try:
        folder = load_checkpoint(checkpoint)[0].args.get('save_dir')
    except Exception:  # Ultralytics says what is wrong with it when it resumes
        return []
    return [Path(folder)] if folder else []
