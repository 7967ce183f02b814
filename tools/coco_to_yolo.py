"""Write a COCO detection set in Ultralytics' layout: ``python tools/coco_to_yolo.py --help``."""

import sys

from kd_plugins.cli import main

if __name__ == '__main__':
    main(['coco-to-yolo', *sys.argv[1:]])
