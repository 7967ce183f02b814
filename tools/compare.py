"""Does distillation help your student? Teacher, plain student and distilled student(s) over the same seeds."""

import argparse

from kd_plugins.mm.cli import run
from kd_plugins.mm.comparison import Comparison, compare

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--teacher', required=True, metavar='CFG', help='config of the teacher')
    parser.add_argument('--teacher-checkpoint', metavar='PTH', help='weights of the teacher; left out: it is trained')
    parser.add_argument('--student', required=True, metavar='CFG', help='config of the plain student')
    parser.add_argument('--kd', nargs='+', required=True, metavar='RECIPE', help='one distilled student for each')
    parser.add_argument('--seeds', type=int, default=1, metavar='N', help='seeds 0 to N-1 (default: 1)')
    parser.add_argument('--work-dir', default='work_dirs/compare', help='where runs and report go')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help="the student's overrides")
    parser.add_argument('--teacher-cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help="the teacher's")
    parser.add_argument('--jobs', type=int, help='trainings at once; default: 2 on CPU, 1 on a GPU')
    args = parser.parse_args()
    run(
        lambda: compare(
            Comparison(
                teacher=args.teacher,
                student=args.student,
                recipes=args.kd,
                work_dir=args.work_dir,
                seeds=range(args.seeds),
                teacher_checkpoint=args.teacher_checkpoint,
                student_options=args.cfg_options,
                teacher_options=args.teacher_cfg_options,
                jobs=args.jobs,
            )
        )
    )
