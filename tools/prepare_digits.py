"""Write the embedded data set: scenes of real handwritten digits for detection, segmentation and classification."""

import argparse
import sys

from kd_plugins.errors import DistillError
from kd_plugins.lab.data import prepare_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--out', default='data/digits', help='folder to write; reused when it has these settings')
    parser.add_argument('--train', type=int, default=1000, help='number of training scenes')
    parser.add_argument('--val', type=int, default=250, help='number of validation scenes')
    parser.add_argument('--size', type=int, default=128, help='image side in pixels, a multiple of 32')
    parser.add_argument('--seed', type=int, default=0, help='seed of split and scenes')
    parser.add_argument('--force', action='store_true', help='rewrite the folder even when nothing changed')
    try:
        prepare_digits(**vars(parser.parse_args()))
    except DistillError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
