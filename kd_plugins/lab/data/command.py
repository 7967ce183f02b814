"""``kd-plugins prepare-digits`` and ``kd-plugins coco-to-yolo``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kd_plugins.lab.data.coco_to_yolo import coco_to_yolo


def digits(argv: Sequence[str] | None = None) -> None:
    """Write the embedded data set.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Raises:
        DistillError: See `prepare_digits`.
    """
    parser = argparse.ArgumentParser(
        prog='kd-plugins prepare-digits',
        description='Write the embedded data set: scenes of real handwritten digits for detection, segmentation and '
        'classification.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--out', default='data/digits', help='folder to write; reused when it has these settings')
    parser.add_argument('--train', type=int, default=1000, help='number of training scenes')
    parser.add_argument('--val', type=int, default=250, help='number of validation scenes')
    parser.add_argument('--size', type=int, default=128, help='image side in pixels, a multiple of 32')
    parser.add_argument('--seed', type=int, default=0, help='seed of split and scenes')
    parser.add_argument('--force', action='store_true', help='rewrite the folder even when nothing changed')
    options = vars(parser.parse_args(argv))
    from kd_plugins.lab.data import prepare_digits

    prepare_digits(**options)


def coco(argv: Sequence[str] | None = None) -> None:
    """Convert a data set.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Raises:
        DistillError: See `coco_to_yolo`.
    """
    parser = argparse.ArgumentParser(
        prog='kd-plugins coco-to-yolo',
        description="Write a COCO detection set in Ultralytics' layout: images/, labels/ and a data.yaml.",
    )
    parser.add_argument('--out', required=True, help='folder to write; must not exist')
    for split in ('train', 'val'):
        parser.add_argument(f'--{split}', nargs=2, required=True, metavar=('JSON', 'IMAGES'), help=f'{split} split')
    parser.add_argument('--copy', action='store_true', help='copy the images; by default they are linked')
    args = parser.parse_args(argv)
    done = coco_to_yolo(args.out, {'train': args.train, 'val': args.val}, copy=args.copy)
    for split, found in done.items():
        print(f'{split}: {found.images} images, {found.boxes} boxes, {found.dropped} annotations left out')
    print(f'data={args.out}/data.yaml')
