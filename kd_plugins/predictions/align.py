"""Bring a student's and a teacher's predictions to the same positions and the same classes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.predictions.dense import FIELDS, DensePredictions

ClassIndices = tuple[Sequence[int], Sequence[int]]

_SAME_POINT = 1e-3  # pixels; grid points are computed in float32


def align(
    student: DensePredictions, teacher: DensePredictions, classes: ClassIndices | None = None
) -> tuple[DensePredictions, DensePredictions]:
    """Make two heads' predictions comparable position by position and class by class.

    1. Levels: only the strides that both have are kept; these must have the same size.
    2. Priors per location: equal numbers are paired in order. One student prior gets the teacher's most
       confident prior of its location (its class, objectness and box). Several student priors all get the one
       prediction of the teacher at their location; the student's own label assignment is sharper, so prefer a
       teacher of the same family. Other combinations are refused.
    3. Points: the teacher's ``ltrb`` are counted from the student's points, so that boxes in pixels stay what
       they were. Its bins (``dist``) and raw ``box`` cannot be moved: they are kept only where points are the
       same, otherwise None (the reason is in ``absent``), and bins only where they tell the same distances.
    4. Classes: ``classes`` selects and orders both; of a softmax head the others join the background.
    5. Objectness: if only one has it (a centerness is none), it is multiplied into that head's classes.
    6. Activation: if the two differ, both become binary logits (``'sigmoid'``), exactly where float32 allows.

    Args:
        student: Predictions of the student; gradients flow through what is returned.
        teacher: Predictions of the teacher for the same images at the same input size.
        classes: ``(student_indices, teacher_indices)`` of the classes that correspond, e.g. from
            :func:`match_classes`. Default None: all classes, in the same order.

    Returns:
        ``(student, teacher)`` of equal batch, positions ``A``, ``points``, ``activation`` and ``num_classes``.

    Raises:
        DistillError: Batches, levels, priors or class counts do not fit together.
    """
    if student.cls.shape[0] != teacher.cls.shape[0]:
        raise DistillError(
            f'The student predicts for {student.cls.shape[0]} images and the teacher for {teacher.cls.shape[0]}.'
        )
    student, teacher = _common_levels(student, teacher)
    teacher = _same_distances(student, _to_positions(teacher, student))
    student, teacher = _common_classes(student, teacher, classes)
    if _has_objectness(student) != _has_objectness(teacher):
        # Of a head with objectness, the classes alone are conditional ("if there is an object") and arbitrary on the
        # background; those of a head without it are the detection scores themselves.
        student, teacher = (p.fold_objectness() if _has_objectness(p) else p for p in (student, teacher))
    if student.activation != teacher.activation:
        student = student.replace(cls=student.binary_logits(), activation='sigmoid')
        teacher = teacher.replace(cls=teacher.binary_logits(), activation='sigmoid')
    return student, teacher


def _same_distances(student: DensePredictions, teacher: DensePredictions) -> DensePredictions:
    """The teacher, without its bins where their distances (of a rotated box, say) are not those of the student's."""
    ours, theirs = (None if p.ltrb is not None else p.box_coding for p in (student, teacher))
    if teacher.dist is None or ours == theirs:
        return teacher
    reason = f'its bins are {theirs or "distances to the sides of an upright box"}, those of the student are not'
    return teacher.replace(dist=None, absent={**teacher.absent, 'dist': reason})


def match_classes(
    student_names: Sequence[str] | None,
    teacher_names: Sequence[str] | None,
    *,
    student_count: int | None = None,
    teacher_count: int | None = None,
) -> tuple[list[int], list[int]] | None:
    """Which class of the student is which class of the teacher, by name.

    Names are compared exactly first, then ignoring case and surrounding blanks. Classes that only one of the
    two knows are left out.

    Args:
        student_names: Class names of the student in order, or None if unknown.
        teacher_names: Class names of the teacher in order, or None if unknown.
        student_count: Number of classes the student's head predicts. Default: ``len(student_names)``.
        teacher_count: Number of classes the teacher's head predicts. Default: ``len(teacher_names)``.

    Returns:
        ``(student_indices, teacher_indices)`` of equal length, or None when the classes are the same in the same
        order, or must be taken to be (names unknown, equal counts).

    Raises:
        DistillError: No class in common, a name given twice, names that do not fit the head's class count, or
            unknown names and different counts.
    """
    counts: list[int | None] = []
    for who, names, count in (('student', student_names, student_count), ('teacher', teacher_names, teacher_count)):
        if names is not None and count is not None and len(names) != count:
            raise DistillError(f"The {who}'s head predicts {count} classes, but {len(names)} class names are known.")
        counts.append(len(names) if names is not None else count)
    if student_names is None or teacher_names is None:
        if counts[0] != counts[1]:
            unknown = 'teacher' if teacher_names is None else 'student'
            shown = ['an unknown number of' if c is None else c for c in counts]
            raise DistillError(
                f'The student has {shown[0]} classes and the teacher {shown[1]}, and the class names of the {unknown} '
                f'are unknown: write the names in the order of its outputs as classes=[...] in {unknown}.'
            )
        return None
    if list(student_names) == list(teacher_names):
        return None
    for who, names in (('student', student_names), ('teacher', teacher_names)):
        twice = sorted({n for n in names if list(names).count(n) > 1})
        if twice:
            raise DistillError(f'The {who} has two classes named {twice[0]!r}; classes are matched by name.')
    pairs = _match(student_names, teacher_names)
    if not pairs:
        raise DistillError(
            f'Student and teacher have no class in common: the student has {_some(student_names)}, the teacher '
            f'{_some(teacher_names)}.'
        )
    student_index = sorted(pairs)
    return student_index, [pairs[i] for i in student_index]


def _common_levels(student: DensePredictions, teacher: DensePredictions) -> tuple[DensePredictions, DensePredictions]:
    strides = [s for s in student.strides if s in teacher.strides]
    if not strides:
        raise DistillError(
            f'Student and teacher have no level in common: strides {student.strides} and {teacher.strides}.'
        )
    student, teacher = student.select_levels(strides), teacher.select_levels(strides)
    for stride, ours, theirs in zip(strides, student.level_sizes, teacher.level_sizes, strict=True):
        if ours != theirs:
            raise DistillError(
                f'At stride {stride:g} the student has {ours[0]}x{ours[1]} cells and the teacher '
                f'{theirs[0]}x{theirs[1]}; both must see the same image size.'
            )
    return student, teacher


def _to_positions(teacher: DensePredictions, student: DensePredictions) -> DensePredictions:
    """The teacher with the student's points and number of priors."""
    ours, theirs = student.num_priors, teacher.num_priors
    if ours == theirs:
        return _rebase(teacher, student.points)
    if ours == 1:
        # Points first: every prior of a location then counts from the student's one point, whichever is picked.
        return _most_confident(_rebase(teacher, _repeated(student.points, theirs)), student.points)
    if theirs == 1:
        return _rebase(_repeat(teacher, ours), student.points)
    raise DistillError(
        f'The student has {ours} priors per location and the teacher {theirs}; they must be equal, or one of them 1.'
    )


def _rebase(predictions: DensePredictions, points: Tensor) -> DensePredictions:
    """The same boxes, with ``ltrb`` counted from other points of the same levels.

    Args:
        predictions: With ``(A, 2)`` points.
        points: ``(A, 2)`` new points in pixels.

    Returns:
        Without ``dist`` and ``box`` where any point moved: both are relative to the old points.
    """
    points = points.to(predictions.points)
    if points is predictions.points:
        return predictions
    changes: dict[str, object] = {'points': points}
    if _moved(points, predictions.points):
        if predictions.ltrb is not None:
            shift = (points - predictions.points) / predictions.stride_of
            changes['ltrb'] = predictions.ltrb + torch.cat([shift, -shift], -1)
        held = [n for n in ('dist', 'box') if getattr(predictions, n) is not None]
        reason = "the teacher's points are not the student's, and only decoded boxes can be moved"
        changes.update(_without(predictions, held, reason))
    return predictions.replace(**changes)


# The readers hand out the same points every time, and comparing them makes the host wait for the GPU. Tensors are
# keys by identity.
@functools.lru_cache(maxsize=16)
def _moved(points: Tensor, others: Tensor) -> bool:
    return bool((points - others).abs().amax() > _SAME_POINT)


@functools.lru_cache(maxsize=16)
def _repeated(points: Tensor, k: int) -> Tensor:
    return points.repeat_interleave(k, 0)


def _most_confident(predictions: DensePredictions, points: Tensor) -> DensePredictions:
    """One prior per location: the one of highest confidence in each image. ``points`` are ``(A / k, 2)``."""
    k = predictions.num_priors
    best = predictions.confidence().unflatten(1, (-1, k)).argmax(-1)  # (B, A / k)

    def pick(tensor: Tensor) -> Tensor:
        index = best.reshape(*best.shape, *[1] * (tensor.dim() - 1))
        groups = tensor.unflatten(1, (-1, k))
        return groups.gather(2, index.expand(-1, -1, 1, *tensor.shape[2:])).squeeze(2)

    names = [n for n in FIELDS if n != 'box' and getattr(predictions, n) is not None]
    changes: dict[str, object] = {n: pick(getattr(predictions, n)) for n in names}
    if predictions.box is not None:
        reason = f"the teacher's {k} priors per location code boxes differently from the student's one"
        changes.update(_without(predictions, ['box'], reason))
    return predictions.replace(**changes, points=points.to(predictions.points), num_priors=1)


def _repeat(predictions: DensePredictions, k: int) -> DensePredictions:
    """``k`` priors per location, all with the one prediction that the location had."""
    changes = {n: v.repeat_interleave(k, 1) for n in FIELDS if (v := getattr(predictions, n)) is not None}
    return predictions.replace(**changes, points=_repeated(predictions.points, k), num_priors=k)


def _without(predictions: DensePredictions, names: Sequence[str], reason: str) -> dict[str, object]:
    """Changes that drop fields and say why."""
    changes: dict[str, object] = dict.fromkeys(names)
    if 'box' in names:
        changes['box_coding'] = None
    return {**changes, 'absent': {**predictions.absent, **dict.fromkeys(names, reason)}}


def _common_classes(
    student: DensePredictions, teacher: DensePredictions, classes: ClassIndices | None
) -> tuple[DensePredictions, DensePredictions]:
    if classes is not None:
        if len(classes[0]) != len(classes[1]) or not len(classes[0]):
            raise DistillError(
                f'Corresponding classes must be two non-empty lists of equal length, got {len(classes[0])} and '
                f'{len(classes[1])}.'
            )
        student, teacher = student.select_classes(classes[0]), teacher.select_classes(classes[1])
    if student.num_classes != teacher.num_classes:
        raise DistillError(
            f'The student predicts {student.num_classes} classes and the teacher {teacher.num_classes}: say which '
            f'correspond, by class names in both configs or classes=[...] in teacher.'
        )
    return student, teacher


def _has_objectness(predictions: DensePredictions) -> bool:
    return predictions.obj is not None and predictions.obj_coding == 'objectness'


def _match(student_names: Sequence[str], teacher_names: Sequence[str]) -> dict[int, int]:
    """Student index -> teacher index: exact names first, the rest ignoring case."""
    exact = {name: i for i, name in enumerate(teacher_names)}
    pairs = {i: exact[name] for i, name in enumerate(student_names) if name in exact}
    taken = set(pairs.values())
    folded: dict[str, int] = {}
    for i, name in enumerate(teacher_names):
        if i not in taken:
            folded.setdefault(name.strip().casefold(), i)
    for i, name in enumerate(student_names):
        if i not in pairs and name.strip().casefold() in folded:
            pairs[i] = folded.pop(name.strip().casefold())
    return pairs


def _some(names: Sequence[str], count: int = 5) -> str:
    shown = ', '.join(repr(n) for n in list(names)[:count])
    return f'{shown}, ... ({len(names)})' if len(names) > count else shown
