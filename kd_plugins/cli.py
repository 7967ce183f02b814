"""``kd-plugins``: one command for everything that is no framework's own.

.. code-block:: bash

    kd-plugins train my_config.py --kd cwd --teacher my_teacher.py --teacher-checkpoint teacher.pth
    kd-plugins recipes
    kd-plugins train --help

A sub-command is one line in `COMMANDS`. Nothing of it is imported before it is called, so that the list of commands is
there at once and a command needs no framework but its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from kd_plugins import __version__
from kd_plugins.errors import DistillError, nearest

#: Name: (function that takes the words after the name, one line on what it does).
COMMANDS = {
    'train': ('kd_plugins.mm.cli:train', 'train an MMEngine config (mmdet, mmseg, timm), plain or distilled'),
    'init': ('kd_plugins.lab.fitting.starter:main', 'write a commented config for your own data, teacher included'),
    'test': ('kd_plugins.mm.cli:test', "evaluate a student's checkpoint; needs no teacher"),
    'compare': (
        'kd_plugins.lab.comparison.command:main',
        'does it help? teacher, plain and distilled students',
    ),
    'demo': ('kd_plugins.lab.comparison.demo:main', 'the comparison on real handwritten digits, some minutes of CPU'),
    'benchmark': ('kd_plugins.lab.benchmark:main', 'what a distilled training step costs, or a dense loss'),
    'recipes': (
        'kd_plugins.lab.fitting.command:main',
        'the published methods; NAME prints one, MODEL says which fit it',
    ),
    'prepare-digits': (
        'kd_plugins.lab.data.command:digits',
        'write the embedded data set of handwritten digits',
    ),
    'coco-to-yolo': ('kd_plugins.lab.data.command:coco', "write a COCO detection set in Ultralytics' layout"),
    'info': ('kd_plugins.info:main', 'versions, and which frameworks can be used here'),
}
HELP = ('help', '-h', '--help')


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command. A distillation that cannot run ends the process with one sentence instead of a traceback.

    Args:
        arguments: Words after the command. Default: those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in HELP:
        print(help_text())
    elif words[0] == '--version':
        print(__version__)
    else:
        try:
            find_command(words[0])(words[1:])
        except DistillError as error:
            sys.exit(f'error: {error}')
        except ModuleNotFoundError as error:
            if not _is_ours(error):
                raise
            sys.exit(f'error: {_missing(words[0], error)}')


def find_command(name: str) -> Callable[[list[str]], Any]:
    """The function behind a sub-command.

    Raises:
        DistillError: There is none, or what it needs is not installed.
    """
    if name not in COMMANDS:
        raise DistillError(f'kd-plugins has no command {name!r}; {nearest(name, COMMANDS)}')
    module, _, function = COMMANDS[name][0].partition(':')
    try:
        return getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if str(error.name).startswith('kd_plugins'):
            raise
        raise DistillError(_missing(name, error)) from error


def _missing(command: str, error: ModuleNotFoundError) -> str:
    package = str(error.name).partition('.')[0]
    return f'kd-plugins {command} needs {package}, which is not installed; kd-plugins info says what to install.'


def _is_ours(error: ModuleNotFoundError) -> bool:
    """Whether it is this package that asked for what is missing, not a user's config or another package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    asking = str(trace.tb_frame.f_globals.get('__name__')) if trace else ''
    return asking.startswith('kd_plugins.') and not str(error.name).startswith('kd_plugins')


def help_text() -> str:
    """What ``kd-plugins --help`` prints."""
    width = max(map(len, COMMANDS))
    return '\n'.join(
        [
            'kd-plugins: knowledge distillation for MMDetection, MMSegmentation, timm and Ultralytics.',
            '',
            *(f'  kd-plugins {name:{width}}  {text}' for name, (_, text) in COMMANDS.items()),
            '',
            'kd-plugins COMMAND --help says more. In Ultralytics: yolo-kd train ..., the yolo command that distils.',
        ]
    )


if __name__ == '__main__':
    main()
