"""Write a COCO detection set in Ultralytics' layout: images/, labels/ and a data.yaml."""

import argparse
import sys

from kd_plugins.errors import DistillError
from kd_plugins.lab.data.coco_to_yolo import coco_to_yolo

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', required=True, help='folder to write; must not exist')
    for split in ('train', 'val'):
        parser.add_argument(f'--{split}', nargs=2, required=True, metavar=('JSON', 'IMAGES'), help=f'{split} split')
    parser.add_argument('--copy', action='store_true', help='copy the images; by default they are linked')
    args = parser.parse_args()
    try:
        done = coco_to_yolo(args.out, {'train': args.train, 'val': args.val}, copy=args.copy)
    except DistillError as error:
        sys.exit(f'error: {error}')
    for split, found in done.items():
        print(f'{split}: {found.images} images, {found.boxes} boxes, {found.dropped} annotations left out')
    print(f'data={args.out}/data.yaml')
