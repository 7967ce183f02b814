"""``kd-plugins demo``: the comparisons on the embedded digits, in every framework."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from importlib import import_module

from kd_plugins.lab.comparison.phases import clock

#: What is printed, the package, its part, the folder below --work-dir.
ZOOS = {
    'mm': ('MMDetection: YOLOX', 'mm', 'detection', '.'),
    'seg': ('MMSegmentation: Semantic FPN', 'mm', 'segmentation', 'seg'),
    'cls': ('timm: DeiT, taught by a ResNet', 'mm', 'classification', 'cls'),
    'cls-vit': ('timm: ResNet, taught by a vision transformer', 'mm', 'across architectures', 'cls_vit'),
    'yolo': ('Ultralytics: YOLO11', 'yolo', None, 'yolo'),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that the command line names.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Raises:
        DistillError: A part cannot be run.
    """
    parser = argparse.ArgumentParser(
        prog='kd-plugins demo',
        description='Does distillation help? Teachers, and twice the same students, on real handwritten digits, in '
        'some minutes of CPU.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--zoo', nargs='+', choices=ZOOS, default=list(ZOOS), help='which parts of the demo')
    parser.add_argument(
        '--work-dir', default='work_dirs/demo', help='where runs and reports go; finished runs are kept'
    )
    parser.add_argument('--data', default='data/digits', help='where the scenes are written, or reused')
    parser.add_argument('--seeds', type=int, default=1, metavar='N', help='students of every kind, with seeds 0 to N-1')
    parser.add_argument('--kd', nargs='+', metavar='RECIPE', help='distilled students; only with a single --zoo')
    parser.add_argument('--jobs', type=int, help='trainings at once; default: 2 on CPU, 1 on a GPU')
    args = parser.parse_args(argv)
    if args.kd and len(args.zoo) > 1:
        parser.error(f'--kd needs --zoo {" or --zoo ".join(ZOOS)}: recipes of one are not those of the other')
    began = time.monotonic()
    for zoo in args.zoo:
        title, package, part, folder = ZOOS[zoo]
        print(f'\n{title}', flush=True)
        options = {**({'part': part} if part else {}), **({'recipes': args.kd} if args.kd else {})}
        demo = import_module(f'kd_plugins.lab.comparison.{package}').demo
        folder = os.path.join(args.work_dir, folder)
        demo(folder, data=args.data, seeds=range(args.seeds), jobs=args.jobs, **options)
    if len(args.zoo) > 1:
        print(f'took {clock(time.monotonic() - began)} in all')
