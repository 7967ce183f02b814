"""What distillation costs per training step, or a dense loss (``--loss``): ``python tools/benchmark.py --help``."""

import sys

from kd_plugins.cli import main

if __name__ == '__main__':
    main(['benchmark', *sys.argv[1:]])
