"""What distillation costs per training step, or a dense loss (``--loss``): ``python tools/benchmark.py --help``."""

import sys

from kd_plugins.errors import DistillError
from kd_plugins.lab.benchmark import main

if __name__ == '__main__':
    try:
        main()
    except DistillError as error:
        sys.exit(f'error: {error}')
