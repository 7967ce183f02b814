"""Recipes by name, the kd.yaml that a user writes, and the one that a run leaves beside its args.yaml."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_plugins import __version__
from kd_plugins.distiller import Session
from kd_plugins.errors import DistillError, check_keys
from kd_plugins.recipes import KEYS, TASKS, find_recipe, is_name, read_yaml
from kd_plugins.recipes.options import recipe_list, split_recipes
from kd_plugins.teachers import load_checkpoint
from kd_plugins.teachers.run import RunOptions
from kd_plugins.yolo.options import DistillOptions

FILE = 'kd.yaml'
#: Options that are short for terms.
SHORT = (
    'cls',
    'box',
    'mask',
    'mask_topk',
    'feature',
    'cls_loss',
    'box_loss',
    'feature_loss',
    'temperature',
    'box_temperature',
    'foreground',
    'branch',
)
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(DistillOptions)}


def read_recipe(recipe: str | os.PathLike) -> dict[str, Any]:
    """The options that a recipe sets, or several with commas between them.

    Args:
        recipe: The name of a recipe of the package, or a file: a kd.yaml, or a recipe of one's own with a body for each
            task. Among several, one file may say more than a recipe does (a kd.yaml with the teacher). A relative
            ``teacher`` in it is relative to the working folder, as every path of Ultralytics.

    Returns:
        The options; their values are not checked yet. What is a body for each task is left to the ``recipe`` option,
        as the task is not known here.

    Raises:
        DistillError: There is no such recipe, it is not a YAML mapping, or has an unknown key; or two files say more.
    """
    entries = split_recipes(os.fspath(recipe))
    found: dict[str, Any] = {}
    recipes: list[str] = []
    for entry in entries:
        values = _read_recipe(entry)
        if len(entries) > 1 and not is_name(entry) and set(values) <= set(KEYS):
            values = {'recipe': str(Path(entry).expanduser().absolute())}
        recipes += recipe_list(values.pop('recipe', None) or [])
        if values and found:
            raise DistillError(
                f'kd: {entry!r} says more than a recipe does, and so does another file; give one of them.'
            )
        found = found or values
    if not recipes:
        return found
    return {**found, 'recipe': recipes[0] if len(recipes) == 1 else recipes}


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = find_recipe(recipe, 'kd')
    if is_name(recipe):
        return {'recipe': recipe}
    where = f'recipe {recipe!r}'
    values = read_yaml(path, where)
    if set(TASKS) & set(values):
        return {'recipe': str(path.absolute())}
    check_keys([str(k) for k in values], DistillOptions.names(), where)
    return values


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
            _refuse_leftover(folder / FILE, checkpoint)
            return str(folder / FILE)
    raise DistillError(
        f'the run in {str(folders[-1])!r} has no {FILE}, so how it was distilled is not known; restore the file or '
        f'name one with kd=path/to/{FILE} (a run without distillation: yolo train resume model=...).'
    )


def write_recipe(path: str | os.PathLike, options: DistillOptions, run: RunOptions, session: Session) -> None:
    """Record what a run distils, in full; a file that says the same, perhaps in short and with comments, is left alone.

    Args:
        path: Of the file.
        options: The options of the callback.
        run: What they stand for.
        session: The checked session: a loss that stood for another has been replaced.
    """
    from ultralytics.utils import YAML

    path = Path(path)
    full = _in_full(options, run, session)
    try:
        known = read_options(path)
    except DistillError:
        known = None
    if known not in (options, full):
        written = {k: _writable(v, k) for k, v in full.to_dict().items() if v != _DEFAULTS.get(k)}
        YAML.save(path, written, header=f'# kd_plugins {__version__}\n')


def _writable(value: Any, key: str = '') -> Any:
    """A value as YAML can hold it: what was given as an object is named."""
    if isinstance(value, Mapping):
        return {str(k): _writable(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, '__qualname__'):
        return f'{value.__module__}{"." if key == "type" else ":"}{value.__qualname__}'
    # It cannot be found again: who resumes gives it to the callback once more.
    return f'a {type(value).__name__} that was in memory'


def _in_full(options: DistillOptions, run: RunOptions, session: Session) -> DistillOptions:
    terms = {}
    for name, cfg in run.terms.items():
        loss = session.terms[name].loss if name in session.terms else None
        written = cfg['loss']['type'] if isinstance(cfg, Mapping) else None
        terms[name] = dict(cfg)
        if loss is not None and isinstance(written, str) and type(loss).__name__ != written.rpartition('.')[2]:
            accepted = inspect.signature(type(loss)).parameters
            terms[name]['loss'] = {
                'type': type(loss).__name__,
                **{k: getattr(loss, k) for k in accepted if hasattr(loss, k)},
            }
    short = {name: _DEFAULTS[name] for name in SHORT}
    pseudo = None if run.pseudo_labels is None else run.pseudo_labels.to_dict()
    return options.replace(
        **short,
        terms=terms,
        recipe=None,
        options=None,
        **({'teacher': run.teachers['']} if set(run.teachers) == {''} and 'teacher' in (options.options or {}) else {}),
        start=run.window.start,
        stop=run.window.stop,
        alpha=run.alpha,
        pseudo_labels=pseudo,
        stages=run.to_dict()['stages'],
    )


def _refuse_leftover(recipe: Path, checkpoint: Path) -> None:
    """Refuse a kd.yaml of an earlier run in the same folder: a distilled run's checkpoint has the columns of its terms.

    Raises:
        DistillError: The checkpoint is of a run that was not distilled.
    """
    results = load_checkpoint(str(checkpoint), 'resume').get('train_results')
    if isinstance(results, Mapping) and results and not any(str(k).startswith('train/kd') for k in results):
        raise DistillError(
            f'{str(recipe)!r} is left over from another run: {str(checkpoint)!r} was trained without distillation; '
            f'resume it with yolo train resume, or name the file, kd={recipe!s}, to distil from here on.'
        )


def _recorded_folder(checkpoint: Path) -> list[Path]:
    """The folder of the run that the checkpoint remembers, if any."""
    from ultralytics.nn.tasks import load_checkpoint

    try:
        folder = load_checkpoint(checkpoint)[0].args.get('save_dir')
    except Exception:  # Ultralytics says what is wrong with it when it resumes
        return []
    return [Path(folder)] if folder else []
