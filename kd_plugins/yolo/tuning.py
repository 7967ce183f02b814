"""Ultralytics' tuner with distillation: its trainings are processes of their own, which distil because of their
environment."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kd_plugins.distiller.ending import JSON_FILE
from kd_plugins.errors import DistillError
from kd_plugins.on_import import REPORT, VARIABLE
from kd_plugins.yolo.callback import DistillCallback, is_main, logger, owner_of, quiet
from kd_plugins.yolo.options import DistillOptions

#: What a child's Python runs at its start: that of ``yolo-kd enable``, which may be there too, and what it hides.
STARTUP = """\
import importlib.machinery, importlib.util, os, sys

if 'kd_plugins.autoload' not in sys.modules:
    sys.path.append({root!r})
    from kd_plugins.autoload import install

    install()
_others = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]
_hidden = importlib.machinery.PathFinder.find_spec('sitecustomize', _others)
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))
"""
#: What a rehearsal does without.
COSTLY = ('plots', 'save', 'cache', 'amp', 'compile', 'verbose')
RECIPE, TRAININGS = 'kd.yaml', 'trainings.jsonl'


class _Begun(Exception):
    """A training is about to begin, which is all that was to be seen."""


def tune(callback: DistillCallback, model: Any, **options: Any) -> Any:
    """Tune a model's hyper-parameters; every training on the way distils.

    Args:
        callback: The distillation.
        model: The ``YOLO`` model that is tuned.
        **options: As for ``model.tune``.

    Returns:
        What ``model.tune`` returns.

    Raises:
        DistillError: The distillation would not run, so no iteration was begun; or no training was distilled.
    """
    if options.get('use_ray'):
        raise DistillError(
            "use_ray=True trains in Ray's own processes, which get no callbacks and would not distil; leave it out "
            f'(the tuner of Ultralytics distils), or run `yolo-kd enable`, set {VARIABLE}=kd.yaml before Ray '
            'starts, and tune a model without a DistillCallback.'
        )
    rehearse(callback, model, options)
    with tempfile.TemporaryDirectory(prefix='kd_plugins_') as folder:
        with inherited(callback.options, Path(folder)):
            found = type(model).tune(model, **options)
        trainings = read_report(Path(folder))
    logger().info(f'\n{report(trainings)}\n')
    return found


def rehearse(callback: DistillCallback, model: Any, options: Mapping[str, Any]) -> None:
    """Do all that a training does before its first iteration: the tuner goes on when each of its trainings fails.

    Args:
        callback: The distillation.
        model: The model that is tuned; it stays as it is.
        options: Those of the tuner.

    Raises:
        DistillError: The distillation would not run.
    """
    from ultralytics.utils import DEFAULT_CFG_DICT

    given = {k: v for k, v in options.items() if k in DEFAULT_CFG_DICT and k not in ('resume', 'save_dir')}
    if given.get('device') is not None:
        # One is enough, and several would be processes of their own.
        given['device'] = str(given['device']).strip('[]() ').partition(',')[0].strip()
    data = given.pop('data', None)
    for one in data if isinstance(data, (list, tuple)) else [data]:
        other = type(model)(model.overrides['model'], task=model.task)
        DistillCallback(callback.options).register(other)
        other.callbacks['on_pretrain_routine_start'].insert(0, _alone)
        other.add_callback('on_pretrain_routine_end', _stop)
        with tempfile.TemporaryDirectory(prefix='kd_plugins_') as folder, quiet(), contextlib.suppress(_Begun):
            here = dict(workers=0, project=folder, name='rehearsal', exist_ok=True)
            if one is not None:
                here['data'] = one
            other.train(**{**given, **dict.fromkeys(COSTLY, False), **here})


def _alone(trainer: Any) -> None:
    """Leave out whoever would log a training that does not take place."""
    for event, handlers in trainer.callbacks.items():
        ours = [h for h in handlers if h in (_alone, _stop) or isinstance(owner_of(h), DistillCallback)]
        trainer.callbacks[event][:] = ours


def _stop(trainer: Any) -> None:
    raise _Begun


@contextlib.contextmanager
def inherited(options: DistillOptions, folder: Path) -> Iterator[None]:
    """Have the trainings of processes that are started meanwhile distil, with or without ``yolo-kd enable``.

    Args:
        options: What to distil.
        folder: Where the processes find it, and where they report.

    Raises:
        DistillError: An option is an object, which another process cannot be given.
    """
    try:
        text = yaml.safe_dump(options.to_dict())
    except yaml.YAMLError as error:
        raise DistillError(
            'tune() trains in processes of its own, which read the distillation from a file, and an option of the '
            "DistillCallback is an object; name it instead, e.g. loss=dict(type='KLDivLoss'), with imports= for your "
            'own.'
        ) from error
    (folder / RECIPE).write_text(text)
    (folder / 'sitecustomize.py').write_text(STARTUP.format(root=str(Path(__file__).parents[2])))
    # Modules of `imports` may lie beside the script.
    paths = [str(folder), os.environ.get('PYTHONPATH', ''), *(p for p in sys.path[:1] if os.path.isdir(p))]
    changed = {
        VARIABLE: str(folder / RECIPE),
        REPORT: str(folder / TRAININGS),
        'PYTHONPATH': os.pathsep.join(p for p in paths if p),
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def add_to_report(trainer: Any) -> None:
    """Tell whoever started this process what was distilled."""
    if not is_main():
        return
    summary = json.loads(Path(trainer.save_dir, JSON_FILE).read_text(encoding='utf-8'))
    with open(os.environ[REPORT], 'a', encoding='utf-8') as file:
        file.write(json.dumps({**summary, 'folder': str(trainer.save_dir)}) + '\n')


def read_report(folder: Path) -> list[dict[str, Any]]:
    """What the processes reported: one ``kd_summary.json`` for each training that was distilled to its end, and
    its ``folder``."""
    path = folder / TRAININGS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def report(trainings: Sequence[Mapping[str, Any]]) -> str:
    """What is said after the tuner's last words.

    Raises:
        DistillError: No training was distilled.
    """
    shares = [t['kd_ratio']['end'] for t in trainings if t['kd_ratio']['end'] is not None]
    if not shares:
        raise DistillError(
            'No training of this tune() was distilled to its end: the log above says how each of them ended, so what '
            'it found is not for distillation.'
        )
    span = f'{min(shares):.3g}' if len(shares) == 1 else f'{min(shares):.3g} to {max(shares):.3g}'
    # The tuner keeps the folder of the best training only.
    kept = next((p for p in (Path(t['folder'], RECIPE) for t in reversed(trainings)) if p.is_file()), Path(RECIPE))
    return (
        f'Knowledge distillation was ON in {len(shares)} training(s) of this tune(); kd_ratio at the end: {span}.\n'
        f'Train with what it found: yolo-kd train cfg=.../best_hyperparameters.yaml kd={kept} model=... data=...'
    )
