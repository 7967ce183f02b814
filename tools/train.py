"""Train any MMEngine config, plain or distilled: ``python tools/train.py --help``."""

import sys

from kd_plugins.cli import main

if __name__ == '__main__':
    main(['train', *sys.argv[1:]])
