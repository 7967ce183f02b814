"""The text of a config that people are to read and change."""

from __future__ import annotations

import colorsys
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_plugins.errors import DistillError

#: Of the written files.
WIDTH = 100
#: Names that are listed in a comment.
SHOWN = 8


def code(value: Any) -> str:
    """A value as configs have it: mappings are ``dict(...)`` where their keys are names."""
    if isinstance(value, Mapping):
        items = {str(k): v for k, v in value.items()}
        if all(k.isidentifier() for k in items):
            return f'dict({", ".join(f"{k}={code(v)}" for k, v in items.items())})'
        return f'{{{", ".join(f"{k!r}: {code(v)}" for k, v in items.items())}}}'
    if isinstance(value, tuple) and not hasattr(value, '_fields'):
        return f'({", ".join(map(code, value))}{"," if len(value) == 1 else ""})'
    if isinstance(value, list):
        return f'[{", ".join(map(code, value))}]'
    return repr(value)


def layout(text: str) -> str:
    """The same config, laid out by yapf as MMEngine's own dumps are; comments stay."""
    from yapf.yapflib.yapf_api import FormatCode

    style = dict(based_on_style='pep8', column_limit=WIDTH, split_before_expression_after_opening_paren=True)
    made: str = FormatCode(re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', style_config=style)[0]
    return made


def in_comment(names: Sequence[Any]) -> str:
    """The first of many names."""
    return ', '.join(map(str, names[:SHOWN])) + (', ...' if len(names) > SHOWN else '')


def colours(count: int) -> list[tuple[int, int, int]]:
    """As many colours as there are classes, far from each other."""
    steps = ((i * 0.618034 % 1, 0.9 if i % 2 else 0.6, 0.95) for i in range(count))
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(*step)) for step in steps]


def place(text: str | os.PathLike, what: str) -> str:
    """The absolute path of a file or folder that exists.

    Raises:
        DistillError: It does not.
    """
    path = os.path.abspath(os.path.expanduser(os.fspath(text)))
    if not os.path.exists(path):
        raise DistillError(f'{what}: there is no {path!r}.')
    return path


def common_root(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that paths share, with a slash at its end, and the paths below it ('' if that is the whole disk)."""
    root = os.path.commonpath([os.path.dirname(p) for p in paths])
    if root == os.path.dirname(root):
        return '', [Path(p).as_posix() for p in paths]
    return Path(root).as_posix().rstrip('/') + '/', [Path(os.path.relpath(p, root)).as_posix() for p in paths]


def free_path(path: Path, text: str) -> Path:
    """Write a text, under a number where the file has another one, which somebody may have changed."""
    stem, number = path.stem, 1
    while path.exists() and path.read_text() != text:
        number += 1
        path = path.with_name(f'{stem}_{number}{path.suffix}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def seed_line(seed: int | None) -> str:
    """The line on the seed, a comment when there is none."""
    return '# randomness = dict(seed=0)  # the same run again' if seed is None else f'randomness = dict(seed={seed})'


def write_new(path: str, text: str, force: bool) -> None:
    """Write a config that nobody has yet.

    Raises:
        DistillError: There is one, or its name is none for a config.
    """
    out = Path(path)
    if out.suffix != '.py':
        raise DistillError(f'--out must end in .py, got {path!r}.')
    if out.exists() and not force:
        raise DistillError(f'--out {path!r} exists; give another name, or --force to replace it.')
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
