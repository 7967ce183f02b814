"""A plain run that goes on where a distilled one stopped, in Ultralytics' own command: a warning, and a clean log."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_plugins.errors import DistillError
from kd_plugins.teachers import load_checkpoint
from kd_plugins.yolo.callback import is_main, logger, unwrapped
from kd_plugins.yolo.criterion import KDCriterion
from kd_plugins.yolo.log import COLUMNS, drop_columns
from kd_plugins.yolo.recipe import FILE

_warned: weakref.WeakSet[Any] = weakref.WeakSet()


def watch(module: Any) -> None:
    """Have every new trainer of Ultralytics call `warn_undistilled`.

    Args:
        module: The one with its default callbacks.
    """
    module.default_callbacks.setdefault('on_train_start', []).append(warn_undistilled)


def warn_undistilled(trainer: Any) -> None:
    """Say so when a resumed run was distilled and is not any more; its log has no columns of distillation then.

    Args:
        trainer: An Ultralytics trainer that is about to begin its first epoch.
    """
    if not trainer.resume or not is_main() or trainer in _warned:
        return
    if type(getattr(unwrapped(trainer.model), 'criterion', None)) is KDCriterion:
        return
    checkpoint = Path(str(trainer.args.model))
    if not was_distilled(checkpoint):
        return
    _warned.add(trainer)
    logger().warning(
        f'{checkpoint} is of a distilled run, which goes on WITHOUT distillation now; to distil, stop it and write: '
        f'yolo-kd train resume model={checkpoint}'
    )
    drop_columns(Path(trainer.csv))


def was_distilled(checkpoint: Path) -> bool:
    """Whether a checkpoint is of a distilled run: the columns of its log say so, else a kd.yaml beside it."""
    try:
        saved = load_checkpoint(str(checkpoint), 'resume')
    except DistillError:  # Ultralytics has read it, and says what is wrong with it
        return False
    results = saved.get('train_results') if isinstance(saved, Mapping) else None
    if isinstance(results, Mapping) and results:
        return any(str(key).startswith(COLUMNS) for key in results)
    folder = checkpoint.parent.parent if checkpoint.parent.name == 'weights' else checkpoint.parent
    return (folder / FILE).is_file()
