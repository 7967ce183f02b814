"""What distillation costs per training step: ``python tools/benchmark.py --help``."""

import argparse
import sys
from importlib import import_module

from kd_plugins.errors import DistillError

ZOOS = {'mm': 'kd_plugins.mm.benchmark', 'yolo': 'kd_plugins.yolo.benchmark'}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--zoo', choices=ZOOS, default='mm')
    chosen, rest = parser.parse_known_args()
    try:
        import_module(ZOOS[chosen.zoo]).main(rest)
    except DistillError as error:
        sys.exit(f'error: {error}')
