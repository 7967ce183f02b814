"""``kd-plugins demo``: the comparisons on the embedded digits, in short or in every framework."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison.experiment import compare_all
from kd_plugins.lab.comparison.phases import clock

#: What is printed, the package, its part, the folder below --work-dir.
ZOOS = {
    'mm': ('MMDetection: YOLOX', 'mm', 'detection', '.'),
    'seg': ('MMSegmentation: Semantic FPN', 'mm', 'segmentation', 'seg'),
    'cls': ('timm: DeiT, taught by a ResNet', 'mm', 'classification', 'cls'),
    'cls-vit': ('timm: ResNet, taught by a vision transformer', 'mm', 'across architectures', 'cls_vit'),
    'yolo': ('Ultralytics: YOLO11', 'yolo', None, 'yolo'),
}
#: What the short tour shows, the first of these that is here: its name in the table, its package, the module that says
#: whether it is here, and options. Both would take twice as long.
TOUR = {
    'Ultralytics: YOLO11': ('yolo', 'ultralytics', dict(short=True)),
    'timm: DeiT, taught by a ResNet': ('mm', 'timm', dict(part='classification', recipes=('deit_token',))),
}
NEXT = """
next, with your own data (add --help to any of them):
  kd-plugins recipes my_config.py --teacher big.py       # what fits; or my.yaml --teacher big.pt
  kd-plugins train my_config.py --kd yolo_logit --teacher big.py --teacher-checkpoint big.pth
  kd-plugins train --model resnet18 --data my_images --teacher model_best.pth.tar
  yolo-kd train model=small.yaml data=mine.yaml kd_teacher=big.pt
  kd-plugins compare --help                              # plain and distilled over seeds, as here
  kd-plugins demo --all                                  # MMDetection and MMSegmentation too, much longer
""".rstrip()


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
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--all', action='store_true', help='all parts, with longer trainings')
    which.add_argument('--zoo', nargs='+', choices=ZOOS, default=[], help='only these parts, with longer trainings')
    parser.add_argument(
        '--work-dir', default='work_dirs/demo', help='where runs and reports go; finished runs are kept'
    )
    parser.add_argument('--data', default='data/digits', help='where the scenes are written, or reused')
    parser.add_argument('--seeds', type=int, default=1, metavar='N', help='students of every kind, with seeds 0 to N-1')
    parser.add_argument('--kd', nargs='+', metavar='RECIPE', help='distilled students; only with a single --zoo')
    parser.add_argument('--jobs', type=int, help='trainings at once; default: 2 on CPU, 1 on a GPU')
    args = parser.parse_args(argv)
    if args.kd and len(args.zoo) != 1:
        parser.error(f'--kd needs --zoo {" or --zoo ".join(ZOOS)}: recipes of one are not those of the other')
    if not (args.all or args.zoo):
        tour(args.work_dir, data=args.data, seeds=range(args.seeds), jobs=args.jobs)
        return
    began, zoos = time.monotonic(), args.zoo or list(ZOOS)
    for zoo in zoos:
        title, package, part, folder = ZOOS[zoo]
        print(f'\n{title}', flush=True)
        options = {**({'part': part} if part else {}), **({'recipes': args.kd} if args.kd else {})}
        demo = import_module(f'kd_plugins.lab.comparison.{package}').demo
        folder = os.path.join(args.work_dir, folder)
        demo(folder, data=args.data, seeds=range(args.seeds), jobs=args.jobs, **options)
    if len(zoos) > 1:
        print(f'took {clock(time.monotonic() - began)} in all')


def tour(work_dir: str | os.PathLike, **options: Any) -> None:
    """A detector in Ultralytics, or without that a classifier in MMEngine: one table and one report.

    Args:
        work_dir: Where runs and report go.
        **options: ``data``, ``seeds`` and ``jobs``, see `kd_plugins.lab.comparison.mm.demo.planned`.

    Raises:
        DistillError: No framework is here.
    """
    folder, experiments = Path(work_dir) / 'tour', {}
    for name, (package, module, more) in TOUR.items():
        if find_spec(module) is not None:
            planned = import_module(f'kd_plugins.lab.comparison.{package}.demo').planned
            experiments[name] = planned(folder / package, **options, **more)
            break
        print(f'{name} is left out: {module} is not installed (kd-plugins info)')
    else:
        raise DistillError('the demo needs ultralytics or timm; kd-plugins info says what to install.')
    compare_all(experiments, folder, 'Handwritten digits: small models, plain and distilled')
    print(NEXT)
