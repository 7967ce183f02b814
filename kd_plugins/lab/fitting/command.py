"""``kd-plugins recipes``: the published methods that are ready to use, and which of them fit two models."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from kd_plugins.errors import DistillError
from kd_plugins.lab.fitting.trial import Pair, Trial, others, try_recipes
from kd_plugins.recipes import KEYS, TASKS, YAML_SUFFIXES, command, description, is_name, read_yaml

WIDTH = command.WIDTH
ZOOS = {'mm': 'kd_plugins.lab.fitting.mm', 'yolo': 'kd_plugins.lab.fitting.yolo'}


def main(argv: Sequence[str] | None = None) -> None:
    """List the recipes, print one, or try all on two models.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Raises:
        DistillError: There is no such recipe or model.
    """
    parser = argparse.ArgumentParser(
        prog='kd-plugins recipes',
        description='The published methods that kd-plugins train --kd NAME and yolo-kd train kd=NAME take; with a '
        'model, those that fit it and why the others do not (no data is needed, nothing is trained).',
    )
    parser.add_argument(
        'name',
        nargs='?',
        metavar='NAME | MODEL',
        help='a recipe to print; or a student, config.py or model.pt',
    )
    parser.add_argument('--task', help=f'list those for one kind of models only: {", ".join(TASKS)}')
    parser.add_argument('--teacher', help='config, .pt or .yaml of the teacher; left out: one like the student')
    parser.add_argument('--teacher-checkpoint', metavar='PTH', help='its weights; left out: random ones')
    args = parser.parse_args(argv)
    if args.name is None or not _is_model(args.name):
        if args.teacher or args.teacher_checkpoint:
            raise DistillError('--teacher needs a student; write kd-plugins recipes my_config.py --teacher ...')
        command.main([*([args.name] if args.name else []), *(['--task', args.task] if args.task else [])])
        return
    zoo = 'yolo' if args.name.endswith(('.pt', *YAML_SUFFIXES)) else 'mm'
    with tempfile.TemporaryDirectory() as folder:
        pair = import_module(ZOOS[zoo]).open_pair(args.name, args.teacher, args.teacher_checkpoint, Path(folder))
        trials = try_recipes(pair)
    columns = shutil.get_terminal_size((WIDTH, 24)).columns
    print(report(pair, trials, min(WIDTH, columns)))
    if not any(t.fits for t in trials):
        sys.exit(1)


def _is_model(name: str) -> bool:
    """Whether a word names a model; the other files and names are recipes."""
    if is_name(name) or (name.startswith('kd_plugins::') and name.endswith(YAML_SUFFIXES)):
        return False
    if not name.endswith(YAML_SUFFIXES) or not Path(name).is_file():
        return True
    return not {*KEYS, *TASKS} & set(read_yaml(name, f'{name!r}'))


def report(pair: Pair, trials: Sequence[Trial], width: int = WIDTH) -> str:
    """What came out, as text.

    Args:
        pair: What was tried.
        trials: What came out.
        width: Columns of a line.
    """
    fitting = [t for t in trials if t.fits]
    failing = [t for t in trials if not t.fits]
    teacher = type(pair.teacher.model).__name__
    lines = [f'student {type(pair.student).__name__}, teacher {teacher}, {pair.task}', *(f'({n})' for n in pair.notes)]
    lines += [
        '',
        f'fits: {len(fitting)} of {len(trials)} recipes; weight of each term, and what is worth trying:',
        '',
    ]
    first = max(map(len, (t.recipe for t in trials)), default=0) + 4
    for trial in fitting:
        lines += _entry(trial.recipe, f'{description(trial.recipe)}: {trial.weights}', first, width)
    if failing:
        lines += ['', f'does not fit: {len(failing)}', '']
        for trial in failing:
            lines += _entry(trial.recipe, trial.reason, first, width)
    lines += ['']
    for task, names in others(pair.task).items():
        lines += textwrap.wrap(f'For {task} only: {", ".join(names)}.', width, subsequent_indent='    ')
    if fitting:
        lines += [
            '',
            'Write --kd NAME (yolo-kd: kd=NAME); several at once are allowed. --kd-options weight=... changes it,',
        ]
        lines += ['and kd-plugins compare --kd NAME --kd-options weight=A,B,C tries several.']
    return '\n'.join(lines)


def _entry(name: str, text: str, first: int, width: int) -> list[str]:
    return textwrap.wrap(f'  {name:{first - 2}}{text}', max(width, first + 30), subsequent_indent=' ' * first)
