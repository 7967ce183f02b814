"""Train any MMEngine config, plain or distilled: ``python tools/train.py --help``."""

from kd_plugins.mm.cli import run, train

if __name__ == '__main__':
    run(train)
