"""Does distillation help? A teacher and twice the same student on real handwritten digits, in some minutes of CPU."""

import argparse

from kd_plugins.mm.cli import run
from kd_plugins.mm.comparison import demo

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--work-dir', default='work_dirs/demo', help='where runs and report go; finished runs are kept')
    parser.add_argument('--data', default='data/digits', help='where the scenes are written, or reused')
    parser.add_argument('--seeds', type=int, default=1, metavar='N', help='pairs of students, with seeds 0 to N-1')
    parser.add_argument(
        '--kd', nargs='+', default=['yolo_logit'], metavar='RECIPE', help='one distilled student for each'
    )
    parser.add_argument('--jobs', type=int, help='trainings at once; default: 2 on CPU, 1 on a GPU')
    args = parser.parse_args()
    run(lambda: demo(args.work_dir, data=args.data, seeds=range(args.seeds), recipes=args.kd, jobs=args.jobs))
