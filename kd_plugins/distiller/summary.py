"""The start-up table that tells a user that KD is on, and with what."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kd_plugins.distiller.protocol import Teacher
from kd_plugins.distiller.schedules import Window
from kd_plugins.distiller.stages import Stage
from kd_plugins.predictions import Classes

#: No line is longer, but for a word that is.
WIDTH = 100
_GAP = '  '
#: How classes are matched where only their number is known.
ASSUMED = 'same number of classes, names of one side unknown: assumed to be in the same order'
#: Where a cell may be broken: between words, and where there is no room for one inside paths and CamelCase.
_SEAM = re.compile(r'(\s+|(?<=[./:_])(?=\w)|(?<=[a-z])(?=[A-Z]))')


@dataclass(frozen=True)
class Row:
    """What one term does, for the summary table."""

    name: str
    loss: str
    student: str
    student_shape: str
    teacher: str
    teacher_shape: str
    adapter: str
    parameters: int
    weight: str
    when: str = ''
    value: float = 0.0


def count(number: int) -> str:
    """A parameter count as people read it: ``5.1M``, ``24.8k``."""
    for limit, unit in ((1_000_000, 'M'), (1_000, 'k')):
        if number >= limit:
            return f'{number / limit:.1f}{unit}'
    return str(number)


def _bytes(number: int) -> str:
    """Memory as people read it."""
    return f'{number / 1e9:.1f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'


def summary(
    rows: Sequence[Row],
    teachers: Mapping[str, Teacher],
    *,
    student: str,
    student_parameters: int,
    classes: Mapping[str, str],
    schedule: str,
    notes: Sequence[str] = (),
    scores: Mapping[str, object] | None = None,
) -> str:
    """The summary as text.

    Args:
        rows: One per term, from :meth:`Session.check`.
        teachers: The loaded teachers by name.
        student: Class of the student.
        student_parameters: Its number of parameters.
        classes: How class sets were matched, by teacher.
        schedule: When KD is on.
        notes: More lines, e.g. keys that were allowed to be missing.
        scores: What teachers reached on validation images, by name, see `TeacherScore`.
    """
    facts: list[tuple[str, str]] = [('student', f'{student}, {count(student_parameters)} parameters')]
    for name, teacher in teachers.items():
        size = teacher.parameters_count * teacher.dtype.itemsize
        dtype = str(teacher.dtype).split('.')[-1]
        kind = f'{count(teacher.parameters_count)} parameters, {dtype}, {_bytes(size)}, {teacher.mode}'
        facts += [
            ('teacher', f'{name}: {teacher.name}, {kind}' if name else f'{teacher.name}, {kind}'),
            ('weights', teacher.checkpoint),
            ('input', teacher.normalization),
            ('classes', classes[name]),
        ]
        if scores is not None and name in scores:
            facts.append(('scored', str(scores[name])))
    facts += [('active', schedule), *(('note', n) for n in notes)]
    table: list[Sequence[str]] = [('term', 'loss', 'weight', 'side', 'tap', 'what is there', 'adapter')]
    for row in rows:
        table.append((row.name, row.loss, row.weight, 'student', row.student, row.student_shape, row.adapter))
        table.append(('', row.when, '', 'teacher', row.teacher, row.teacher_shape, ''))
    head, *body = [wrapped(line, _widths(table)) for line in table]
    rule = '  ' + '-' * (max(len(line) for block in (head, *body) for line in block) - 2)
    lines = ['Knowledge distillation is ON']
    lines += [line for key, value in facts for line in entry(key, value)]
    lines += [rule, *head, rule, *(line for block in body for line in block), rule]
    trainable = sum(r.parameters for r in rows)
    lines.append(
        f'  trainable adapter parameters: {count(trainable)} (not part of the student or its checkpoint weights)'
    )
    return '\n'.join(lines)


def entry(key: str, value: str) -> list[str]:
    """A fact of a summary, on as many lines as it takes; paths stay in one piece."""
    wrapper = textwrap.TextWrapper(WIDTH - 11, break_on_hyphens=False, break_long_words=False)
    first, *more = wrapper.wrap(value) or ['']
    return [f'  {key:<8} {first}'.rstrip(), *(' ' * 11 + line for line in more)]


def wrapped(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """A line of a table, on as many lines as its longest cell takes."""
    blocks = [
        _wrapper(width, width < _longest(cell)).wrap(cell) or [''] for cell, width in zip(cells, widths, strict=True)
    ]
    lines = []
    for i in range(max(map(len, blocks))):
        parts = [b[i] if i < len(b) else '' for b in blocks]
        lines.append((_GAP + _GAP.join(p.ljust(w) for p, w in zip(parts, widths, strict=True))).rstrip())
    return lines


def _widths(table: Sequence[Sequence[str]]) -> list[int]:
    """Widths of the columns; the widest give way until a line is no longer than `WIDTH`, between words if they can."""
    columns = list(zip(*table, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [max(map(_longest, column)) for column in columns]
    while sum(widths) + len(_GAP) * len(widths) > WIDTH:
        loose = [i for i, width in enumerate(widths) if width > words[i]] or range(len(widths))
        widths[max(loose, key=widths.__getitem__)] -= 1
    return widths


def _longest(cell: str) -> int:
    return max(map(len, cell.split()), default=1)


def _wrapper(width: int, seams: bool) -> textwrap.TextWrapper:
    wrapper = textwrap.TextWrapper(max(width, 1), break_on_hyphens=False)
    if seams:
        wrapper.wordsep_simple_re = _SEAM
    return wrapper


def classes_text(
    student: Sequence[str] | None, teacher: Sequence[str] | None, classes: Classes, compared: bool = True
) -> str:
    """How the classes of student and teacher were matched, and which are not taught.

    Args:
        student: Names of the student's classes.
        teacher: Names of the teacher's.
        classes: Which of them correspond; None when the sets are equal.
        compared: Whether any term compares class by class.
    """
    if not compared:
        return 'not compared'
    if classes is not None:
        chosen = set(classes[0])
        names = student if student is not None else [str(i) for i in range(max(chosen) + 1)]
        rest = [name for i, name in enumerate(names) if i not in chosen]
        shown = f'; not taught: {", ".join(rest[:8])}{", ..." if len(rest) > 8 else ""}' if rest else ''
        knows = '' if teacher is None else f' (teacher knows {len(teacher)})'
        return f'{len(chosen)} of {len(names)} student classes taught by name{knows}{shown}'
    if student is None or teacher is None:
        return ASSUMED
    return f'the same {len(student)} classes'


def schedule_text(
    window: Window, unit: str, total: int, alpha: float | None = None, stages: Sequence[Stage] = ()
) -> str:
    """When KD is on, in words."""
    last = f'up to {unit} {window.stop}' if window.stop is not None else 'to the end'
    balance = '' if alpha is None else f", {alpha:g} x distillation + {1 - alpha:g} x the student's own loss"
    parts = '; '.join(f'({i}) {stage}' for i, stage in enumerate(stages, 1))
    return f'from {unit} {window.start} {last} (of {total}){balance}' + (f'; stages: {parts}' if parts else '')
