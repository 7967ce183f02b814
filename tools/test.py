"""Evaluate a student's checkpoint: ``python tools/test.py --help``."""

from kd_plugins.mm.cli import run, test

if __name__ == '__main__':
    run(test)
