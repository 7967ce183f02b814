"""Does distillation help your student? Several students over the same seeds: ``python tools/compare.py --help``."""

import sys

from kd_plugins.cli import main

if __name__ == '__main__':
    main(['compare', *sys.argv[1:]])
