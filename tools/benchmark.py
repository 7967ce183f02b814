"""What distillation costs per training step, or a dense loss (``--loss``): ``python tools/benchmark.py --help``."""

import argparse
import sys
from importlib import import_module

from kd_plugins.errors import DistillError

ZOOS = {'mm': 'kd_plugins.lab.benchmark.mm', 'yolo': 'kd_plugins.lab.benchmark.yolo'}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--zoo', choices=ZOOS, default='mm')
    parser.add_argument('--loss', nargs='*')
    chosen, rest = parser.parse_known_args()
    module = ZOOS[chosen.zoo]
    if chosen.loss is not None:
        module, rest = 'kd_plugins.lab.benchmark.losses', [*rest, '--loss', *chosen.loss]
    try:
        import_module(module).main(rest)
    except DistillError as error:
        sys.exit(f'error: {error}')
