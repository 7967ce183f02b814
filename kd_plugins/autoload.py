"""The explicit opt-in with which an unmodified ``yolo train`` distils: an environment variable that names a kd.yaml.

``yolo-kd enable`` writes a one-line ``.pth`` file into this environment's site-packages. At the start of each Python
it looks whether the variable is set, and does nothing when it is not. When it is, `install` waits for Ultralytics to
be imported and adds one entry to its default callbacks.

It lies outside of ``kd_plugins.yolo`` because that imports torch, which no start of Python may wait for.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from kd_plugins.on_import import REPORT, VARIABLE, complete_callbacks

PTH = 'kd_plugins_yolo.pth'
#: Also for a run that is resumed without the variable: it may have been a distilled one.
LINE = (
    f"import os, sys; (os.environ.get('{VARIABLE}') or 'resume' in str(getattr(sys, 'orig_argv', ''))) "
    f"and __import__('{__name__}', fromlist=['install']).install()\n"
)

EVENTS = ('on_pretrain_routine_start', 'on_pretrain_routine_end')


# ---------------------------------------------------------------------- the switch: yolo-kd enable | disable | status
def pth_file(folder: str | None = None) -> str:
    """Path of the ``.pth`` file, by default in the site-packages of this interpreter."""
    import sysconfig

    return os.path.join(folder or sysconfig.get_paths()['purelib'], PTH)


def enable(folder: str | None = None) -> str:
    """Let this environment's Python look at the variable.

    Args:
        folder: Folder whose ``.pth`` files Python reads. Default: site-packages.

    Returns:
        What was done, for the user.

    Raises:
        DistillError: The folder cannot be written to, or kd_plugins is not installed in this environment.
    """
    from kd_plugins.errors import DistillError

    if not _importable():
        raise DistillError(
            f'kd_plugins is not installed for {sys.executable}: from another folder it could not be imported.'
        )
    path = pth_file(folder)
    try:
        with open(path, 'w', encoding='utf-8') as file:
            file.write(LINE)
    except OSError as error:
        raise DistillError(f'{path} cannot be written ({error.strerror}); use a virtual environment.') from error
    return (
        f'Enabled by {path}.\n'
        f'Distil with an unmodified yolo:  {VARIABLE}=kd.yaml yolo train model=... data=...\n'
        f'Without {VARIABLE} nothing changes, but you are warned when a distilled run is resumed. Undo: yolo-kd disable'
    )


def disable(folder: str | None = None) -> str:
    """Undo `enable`.

    Returns:
        What was done, for the user.

    Raises:
        DistillError: The file cannot be removed.
    """
    from kd_plugins.errors import DistillError

    path = pth_file(folder)
    try:
        os.remove(path)
    except FileNotFoundError:
        return 'It was not enabled; nothing was changed.'
    except OSError as error:
        raise DistillError(f'{path} cannot be removed ({error.strerror}).') from error
    return f'Disabled: {path} was removed.'


def status(folder: str | None = None) -> str:
    """Whether an unmodified ``yolo train`` would distil, in one or two lines."""
    path, recipe = pth_file(folder), os.environ.get(VARIABLE)
    enabled = os.path.isfile(path)
    lines = [f'enabled by {path}' if enabled else 'not enabled: an unmodified yolo is untouched (yolo-kd enable)']
    if recipe:
        lines.append(f'{VARIABLE}={recipe}' + ('' if os.path.isfile(recipe) else ', which does not exist'))
        lines.append(f'yolo train {"distils" if enabled else "does not distil"}')
    else:
        lines.append(f'{VARIABLE} is not set: yolo train does not distil')
    return '\n'.join(lines)


def _importable() -> bool:
    import subprocess
    import tempfile

    code = f'import {__name__}'
    with tempfile.TemporaryDirectory() as elsewhere:  # `-c` would find a package that just lies in this folder
        return subprocess.run([sys.executable, '-c', code], cwd=elsewhere, capture_output=True).returncode == 0


# ---------------------------------------------------------------------- what the .pth file calls, when it is set
def install() -> None:
    """Wait for the import of Ultralytics; imports nothing itself."""
    if os.environ.get(VARIABLE):
        # Absolute: the program may change its folder before it trains.
        recipe = os.path.abspath(os.environ[VARIABLE])
        complete_callbacks(lambda module: _distil(module, recipe))
    complete_callbacks(_watch)


def _distil(module: Any, recipe: str) -> None:
    callback = RecipeCallback(recipe)
    for event in EVENTS:
        module.default_callbacks[event].append(getattr(callback, event))


def _watch(module: Any) -> None:
    module.default_callbacks.setdefault('on_train_start', []).append(on_train_start)


def on_train_start(trainer: Any) -> None:
    """Warn of a distilled run that is resumed without distillation."""
    if getattr(trainer, 'resume', False):
        from kd_plugins.yolo.resume import warn_undistilled

        warn_undistilled(trainer)


class RecipeCallback:
    """Registers a `DistillCallback` for a recipe when a training begins, on every rank.

    Nothing is read before, so that ``yolo predict`` and the like do not depend on the recipe.

    Args:
        recipe: Absolute path of the kd.yaml.
    """

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe

    def on_pretrain_routine_start(self, trainer: Any) -> None:
        """Refuse a wrong recipe before the data set is read."""
        if not self._has_own(trainer):
            self._build()

    def on_pretrain_routine_end(self, trainer: Any) -> None:
        """Register for this training and do what it would have done at this event."""
        if self._has_own(trainer):
            from ultralytics.utils import LOGGER

            LOGGER.info(f'{VARIABLE} is ignored: this run has a DistillCallback of its own.')
            return
        from kd_plugins.yolo.callback import EVENTS as ALL

        callback = self._build()
        # This event's handlers are being gone through: one that is added now would be called by luck only.
        for event in ALL:
            if event != EVENTS[1]:
                trainer.add_callback(event, getattr(callback, event))
        if os.environ.get(REPORT):
            from kd_plugins.yolo.tuning import add_to_report

            trainer.add_callback('on_train_end', add_to_report)
        callback.on_pretrain_routine_end(trainer)

    def _build(self) -> Any:
        from kd_plugins.yolo import DistillCallback
        from kd_plugins.yolo.callback import check_version
        from kd_plugins.yolo.recipe import read_options

        check_version()
        return DistillCallback(read_options(self.recipe))

    def _has_own(self, trainer: Any) -> bool:
        from kd_plugins.yolo.callback import registered

        return bool(registered(trainer))
