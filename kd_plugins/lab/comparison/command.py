"""``kd-plugins compare``: does distillation help your student?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

ZOOS = {'mm': 'kd_plugins.lab.comparison.mm', 'yolo': 'kd_plugins.lab.comparison.yolo'}
#: Options whose names are the framework's: configs of MMEngine's Runner, Ultralytics' models and data.
OWN = {
    'mm': (
        ('--teacher-checkpoint', dict(metavar='PTH', help='weights of the teacher; left out: it is trained')),
        ('--cfg-options', dict(nargs='+', default=[], metavar='KEY=VALUE', help="the student's overrides")),
        ('--teacher-cfg-options', dict(nargs='+', default=[], metavar='KEY=VALUE', help="the teacher's")),
    ),
    'yolo': (
        ('--data', dict(required=True, metavar='YAML', help='data set')),
        ('--options', dict(nargs='+', default=[], metavar='KEY=VALUE', help="the students' options of yolo train")),
        ('--teacher-options', dict(nargs='+', default=[], metavar='KEY=VALUE', help="the teacher's")),
    ),
}
HELP = {
    'mm': dict(
        teacher='config of the teacher: a detector, a segmentor or a classifier',
        student='config of the plain student, of the same kind',
        kd='recipes (kd-plugins recipes lists them) or files: one distilled student for each, a,b for both at once',
    ),
    'yolo': dict(
        teacher='.pt; or .yaml, which is trained first',
        student='.yaml or .pt',
        kd="'native' (distill_model=), 'default', recipes (kd-plugins recipes lists them), names in configs/yolo or "
        'files: one distilled student for each',
    ),
}
RENAMED = {
    'kd': 'recipes',
    'kd_options': 'recipe_options',
    'options': 'student_options',
    'cfg_options': 'student_options',
    'teacher_cfg_options': 'teacher_options',
}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare what the command line says.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Raises:
        DistillError: Something is missing or cannot be compared.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument('--zoo', choices=ZOOS, default='mm')
    zoo = first.parse_known_args(argv)[0].zoo
    parser = argparse.ArgumentParser(
        prog='kd-plugins compare',
        description='Does distillation help your student? Teacher, plain student and distilled student(s) over the '
        'same seeds.',
        epilog='Other options: --zoo mm --help, --zoo yolo --help',
    )
    parser.add_argument(
        '--zoo', choices=ZOOS, default='mm', help="framework: mm is mmdet, mmseg and timm's classifiers (default: mm)"
    )
    parser.add_argument('--teacher', required=True, help=HELP[zoo]['teacher'])
    parser.add_argument('--student', required=True, help=HELP[zoo]['student'])
    parser.add_argument('--kd', nargs='+', required=True, metavar='RECIPE', help=HELP[zoo]['kd'])
    parser.add_argument(
        '--kd-options',
        nargs='+',
        action='append',
        default=[],
        metavar='NAME=VALUE',
        help='changes to the recipes: weight=3, TERM.weight=3, alpha=0.7, stop=280; weight=1,3,10 tries several, each '
        'combination a distilled student of its own',
    )
    for option, settings in OWN[zoo]:
        parser.add_argument(option, **settings)
    parser.add_argument('--seeds', type=int, default=1, metavar='N', help='seeds 0 to N-1 (default: 1)')
    parser.add_argument('--work-dir', default='work_dirs/compare', help='where runs and report go')
    parser.add_argument('--jobs', type=int, help='trainings at once; default: 2 on CPU, 1 on a GPU')
    args = vars(parser.parse_args(argv))
    del args['zoo']
    args['seeds'] = range(args['seeds'])
    comparison = import_module(ZOOS[zoo])
    comparison.compare(comparison.Comparison(**{RENAMED.get(k, k): v for k, v in args.items()}))
