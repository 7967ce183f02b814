"""Evaluate a student's checkpoint: ``python tools/test.py --help``."""

import sys

from kd_plugins.cli import main

if __name__ == '__main__':
    main(['test', *sys.argv[1:]])
