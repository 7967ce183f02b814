"""The start-up table that tells a user that KD is on, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd_plugins.distiller.protocol import Teacher


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


def count(number: int) -> str:
    """A parameter count as people read it: ``5.1M``, ``24.8k``."""
    for limit, unit in ((1_000_000, 'M'), (1_000, 'k')):
        if number >= limit:
            return f'{number / limit:.1f}{unit}'
    return str(number)


def summary(
    rows: Sequence[Row],
    teacher: Teacher,
    *,
    student: str,
    student_parameters: int,
    classes: str,
    schedule: str,
    notes: Sequence[str] = (),
) -> str:
    """The summary as text.

    Args:
        rows: One per term, from :meth:`Distiller.dry_run`.
        teacher: The loaded teacher.
        student: Class of the student.
        student_parameters: Its number of parameters.
        classes: How class sets were matched.
        schedule: When KD is on.
        notes: More lines, e.g. keys that were allowed to be missing.
    """
    facts: list[tuple[str, str]] = [
        ('student', f'{student}, {count(student_parameters)} parameters'),
        (
            'teacher',
            f'{teacher.name}, {count(teacher.parameters_count)} parameters, {str(teacher.dtype).split(".")[-1]}, '
            f'{teacher.mode}',
        ),
        ('weights', teacher.checkpoint),
        ('input', teacher.normalization),
        ('classes', classes),
        ('active', schedule),
        *(('note', n) for n in notes),
    ]
    header = ('term', 'loss', 'weight', 'side', 'tap', 'what is there', 'adapter')
    table: list[Sequence[str]] = [header]
    for row in rows:
        adapter = row.adapter if not row.parameters else f'{row.adapter}'
        table.append((row.name, row.loss, row.weight, 'student', row.student, row.student_shape, adapter))
        table.append(('', '', '', 'teacher', row.teacher, row.teacher_shape, ''))
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
