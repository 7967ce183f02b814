"""Train a config in a process that is killed, then resume it in another: ``python -m ... KILLED RESUMED``.

Both are this process, forked before it has run anything: to start takes longer than the runs do.
"""

import importlib
import os
import sys

from mmengine.config import Config

from kd_plugins.mm import cli


def main(killed: str, resumed: str) -> None:
    """Print how the first run ended, and go on with the second."""
    scope = Config.fromfile(killed).default_scope
    importlib.import_module('timm' if scope == 'mmengine' else f'{scope}.models')
    child = os.fork()
    if not child:
        cli.train([killed])
        os._exit(0)
    print(f'The first run ended with {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}.')
    cli.train([resumed, '--resume'])


if __name__ == '__main__':
    main(*sys.argv[1:])
