"""The start-up table that tells a user that KD is on, and with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kd_plugins.distiller.protocol import Teacher
from kd_plugins.distiller.schedules import Window
from kd_plugins.predictions import Classes


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


def summary(
    rows: Sequence[Row],
    teachers: Mapping[str, Teacher],
    *,
    student: str,
    student_parameters: int,
    classes: Mapping[str, str],
    schedule: str,
    notes: Sequence[str] = (),
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
    """
    facts: list[tuple[str, str]] = [('student', f'{student}, {count(student_parameters)} parameters')]
    for name, teacher in teachers.items():
        kind = f'{count(teacher.parameters_count)} parameters, {str(teacher.dtype).split(".")[-1]}, {teacher.mode}'
        facts += [
            ('teacher', f'{name}: {teacher.name}, {kind}' if name else f'{teacher.name}, {kind}'),
            ('weights', teacher.checkpoint),
            ('input', teacher.normalization),
            ('classes', classes[name]),
        ]
    facts += [('active', schedule), *(('note', n) for n in notes)]
    header = ('term', 'loss', 'weight', 'side', 'tap', 'what is there', 'adapter')
    table: list[Sequence[str]] = [header]
    for row in rows:
        table.append((row.name, row.loss, row.weight, 'student', row.student, row.student_shape, row.adapter))
        table.append(('', row.when, '', 'teacher', row.teacher, row.teacher_shape, ''))
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    rule = '  ' + '-' * (sum(widths) + 2 * (len(widths) - 1))
    lines = ['Knowledge distillation is ON']
    lines += [f'  {key:<8} {value}' for key, value in facts]
    lines.append(rule)
    for index, line in enumerate(table):
        lines.append(('  ' + '  '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))).rstrip())
        if index == 0:
            lines.append(rule)
    trainable = sum(r.parameters for r in rows)
    lines.append(rule)
    lines.append(
        f'  trainable adapter parameters: {count(trainable)} (not part of the student or its checkpoint weights)'
    )
    return '\n'.join(lines)


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
        return 'same number of classes, names of one side unknown: assumed to be in the same order'
    return f'the same {len(student)} classes'


def schedule_text(window: Window, unit: str, total: int, alpha: float | None = None) -> str:
    """When KD is on, in words."""
    last = f'up to {unit} {window.stop}' if window.stop is not None else 'to the end'
    balance = '' if alpha is None else f", {alpha:g} x distillation + {1 - alpha:g} x the student's own loss"
    return f'from {unit} {window.start} {last} (of {total}){balance}'
