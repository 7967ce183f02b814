"""``kd-plugins recipes``: the published methods that are ready to use."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence

from kd_plugins.errors import DistillError, nearest
from kd_plugins.recipes import TASKS, description, find_recipe, names, tasks_of

#: Columns of a line at most, on the widest terminal.
WIDTH = 100


def main(argv: Sequence[str] | None = None) -> None:
    """List the recipes, or print one.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Raises:
        DistillError: There is no such recipe.
    """
    parser = argparse.ArgumentParser(
        prog='kd-plugins recipes',
        description='The published methods that kd-plugins train --kd NAME and yolo-kd train kd=NAME take.',
    )
    parser.add_argument('name', nargs='?', help='print this recipe: copy it, change it, and give the file instead')
    parser.add_argument('--task', help=f'list those for one kind of models only: {", ".join(TASKS)}')
    args = parser.parse_args(argv)
    if args.name:
        print(find_recipe(args.name, 'recipes').read_text(encoding='utf-8'), end='')
        return
    if args.task not in (None, *TASKS):
        raise DistillError(f'--task: there is no task {args.task!r}; {nearest(args.task, TASKS)}')
    print(table(args.task, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)))


def table(task: str | None = None, width: int = WIDTH) -> str:
    """Names, tasks and one line each.

    Args:
        task: Only the recipes for this task.
        width: Columns of a line.
    """
    rows = [('recipe', 'for', 'method')]
    for name in names(task):
        known = tasks_of(name)
        rows.append((name, 'every task' if set(known) == set(TASKS) else ', '.join(known), description(name)))
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    indent = ' ' * (first + second + 4)
    lines = []
    for name, tasks, text in rows:
        start = f'{name:{first}}  {tasks:{second}}  '
        lines += textwrap.wrap(start + text, max(width, len(indent) + 30), subsequent_indent=indent)
    rule = '-' * max(map(len, lines))
    return '\n'.join([lines[0], rule, *lines[1:]])
