"""What a teacher is worth before the first iteration: what its scores on some validation images say about it.

A host measures (see `Scorer`), with its framework's own evaluator; what follows from the numbers is decided here, the
same for every zoo.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_plugins.distiller.rng import untouched_rng
from kd_plugins.errors import DistillError, in_words
from kd_plugins.predictions import Classes

#: Validation images that a teacher is scored on, unless the run says how many.
IMAGES = 32
#: And of what a run trains on (images times epochs) at most this share; fewer than `FEWEST` say nothing.
SHARE, FEWEST = 0.05, 8
#: Overlap from which on a box is that of an object.
OVERLAP = 0.5
#: A permutation of the classes must reach this mean recall, and be better than their own order by this much.
PERMUTED, BETTER = 0.5, 0.25
#: About as many regions of a picture are independent of each other: pixels are not.
REGIONS = 16
UNNAMED = (
    'The names of the classes of one side are unknown: they are assumed to be in the same order. Give the names of the '
    "teacher's outputs as classes=[...]."
)


@dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    Attributes:
        metrics: Of the framework's evaluator; the compared one first. Empty where nothing was predicted: 0.
        greater: Whether more of it is better; None: that is not known.
        confusion: ``(C, C)`` int64 as the student numbers its classes: how often something of a class (row) was taken
            for another (column), perhaps with a column more for what was missed; None where predictions cannot be
            counted so.
        samples: How many independent ones were counted.
    """

    metrics: Mapping[str, float]
    greater: bool | None = True
    confusion: Tensor | None = None
    samples: int = 0


class Scorer(Protocol):
    """A host's way to measure models on some images of its validation set."""

    images: int
    total: int

    def measure(self, teachers: Mapping[str, Classes], student: bool) -> dict[str | None, Measured]:
        """Measure teachers, and the student as it starts, on the same images.

        Args:
            teachers: By name, ``(student_index, teacher_index)`` of the classes that both know.
            student: Whether the student is measured too, which is called None.

        Raises:
            DistillError: There is nothing to measure on.
        """
        ...


@dataclass(frozen=True)
class TeacherScore:
    """What a teacher and the student reach on the same images before the first iteration.

    Attributes:
        metric: What was compared.
        value: The teacher's.
        images: How many images.
        total: How many the validation set has.
        student: The student's, None where it was not measured.
        greater: Whether more is better.
        confusion: The teacher's, see `Measured`, of the classes that it knows, without what it missed.
        objects: How many of these classes there were.
        samples: See `Measured`.
        names: Of these classes; None when unknown.
        metrics: All that was measured of the teacher.
    """

    metric: str
    value: float
    images: int
    total: int
    student: float | None = None
    greater: bool = True
    confusion: Tensor | None = None
    objects: int = 0
    samples: int = 0
    names: Sequence[str] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        start = '' if self.student is None else f'; the student starts at {self.student:.4g}'
        return f'{self.metric} {self.value:.4g} {self.where}{start}'

    @property
    def where(self) -> str:
        """Which images these were, in words."""
        if self.images >= self.total:
            return f'on the {self.total} validation images'
        return f'on {self.images} of {self.total} validation images'

    @property
    def confirms_order(self) -> bool:
        """Whether the teacher's predictions say that its classes are in the student's order."""
        if self.confusion is None or self._permutation() is not None:
            return False
        seen = int((self.confusion.sum(1) > 0).sum())
        return seen > 1 and mean_recall(self.confusion) >= self._sure()

    def warnings(self, assumed: bool = False) -> list[str]:
        """What is wrong with this teacher, each in a sentence.

        Args:
            assumed: Whether the names of one side are unknown, and the classes taken to be in the same order.
        """
        swapped = self._permutation()
        if swapped is not None:
            pairs = list(swapped.items())
            shown = ', '.join(f'{self._name(a)} for {self._name(b)}' for a, b in pairs[:3])
            more = ', ...' if len(pairs) > 3 else ''
            return [
                f'The order of the classes looks permuted: {self.where}, the teacher takes {shown}{more}. Give the '
                "names of the teacher's outputs in their order as classes=[...]."
            ]
        found = []
        if self.confusion is not None and self.objects and self.confusion.sum() == 0:
            found.append(f'The teacher finds none of the objects ({self}): it has nothing to teach.')
        elif self._is_chance():
            found.append(
                f'The teacher is not clearly better than chance ({self}; mean recall of the classes '
                f'{mean_recall(self.confusion):.2g}): are its weights, classes and normalisation right?'  # type: ignore[arg-type]
            )
        elif self._is_behind():
            found.append(f'The teacher is not better than the student starts: {self}.')
        if assumed and not self.confirms_order:
            found.append(UNNAMED)
        return found

    def _name(self, index: int) -> str:
        return repr(self.names[index]) if self.names is not None else f'class {index}'

    def _is_behind(self) -> bool:
        if self.student is None:
            return False
        if self.value == self.student:
            # Of a student that starts from its teacher that is so, and meant.
            return not self.value
        return (self.value < self.student) == self.greater

    def _is_chance(self) -> bool:
        if self.confusion is None or int((self.confusion.sum(1) > 0).sum()) < 2:
            return False
        return mean_recall(self.confusion) <= self._by_chance(2)

    def _permutation(self) -> dict[int, int] | None:
        return None if self.confusion is None else permutation(self.confusion, self._sure())

    def _sure(self) -> float:
        return max(PERMUTED, self._by_chance(4))

    def _by_chance(self, deviations: float) -> float:
        """The mean recall that guessing does not reach, but for so many standard deviations."""
        guess = 1 / len(self.confusion) if self.confusion is not None else 0.0
        return guess + deviations * math.sqrt(guess * (1 - guess) / max(self.samples, 1))


def images_wanted(option: bool | int | None, trained: float) -> int:
    """How many validation images a teacher is to be scored on.

    Args:
        option: ``score_teacher``: a number of images, True for `IMAGES`, False for none; None: as many as cost little.
        trained: Images that the run trains on: those of an epoch times the epochs.
    """
    if option is None:
        number = min(IMAGES, int(trained * SHARE))
        return number if number >= FEWEST else 0
    return IMAGES if option is True else int(option)


def check_score_teacher(value: Any) -> bool | int | None:
    """The option ``score_teacher``.

    Raises:
        DistillError: It is neither a whole number >= 1 nor True or False.
    """
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, int) or value < 0:
        raise DistillError(
            f'score_teacher must be a number of validation images, e.g. 64, or False to leave it out, got {value!r}.'
        )
    return value


def score_teachers(
    scorer: Scorer | None, teachers: Mapping[str, Classes], names: Sequence[str] | None, student: bool = True
) -> tuple[dict[str, TeacherScore], list[str]]:
    """Score teachers; whatever goes wrong is no reason not to train, and neither generators nor gradients notice.

    Args:
        scorer: The host's; None: the run has no validation.
        teachers: By name, ``(student_index, teacher_index)`` of the classes that both know.
        names: Of the student's classes.
        student: Whether the student is measured too.

    Returns:
        The scores by name, and notes for the summary.
    """
    if scorer is None:
        return {}, ['the teacher was not scored: the run has no validation']
    try:
        with untouched_rng(), torch.no_grad():
            found = scorer.measure(teachers, student)
    except Exception as error:
        return {}, [f'the teacher was not scored: {in_words(error)[:200]}']
    scores = {}
    for name, classes in teachers.items():
        measured = found[name]
        metric = next((key for m in (measured, *found.values()) for key in m.metrics), 'predictions')
        confusion, called, objects = measured.confusion, names, 0
        if confusion is not None:
            known = list(range(len(confusion))) if classes is None else sorted(classes[0])
            objects = int(confusion[known].sum())
            called = None if names is None or len(names) != len(confusion) else [names[i] for i in known]
            confusion = confusion[known][:, known]
        greater = next((m.greater for m in (measured, *found.values()) if m.greater is not None), True)
        scores[name] = TeacherScore(
            metric=metric,
            value=measured.metrics.get(metric, 0.0),
            images=scorer.images,
            total=scorer.total,
            student=found[None].metrics.get(metric, 0.0) if None in found else None,
            greater=greater,
            confusion=confusion,
            objects=objects,
            samples=measured.samples,
            names=called,
            metrics=measured.metrics,
        )
    return scores, []


def best_of(scores: Iterable[TeacherScore]) -> tuple[float | None, str]:
    """The best teacher's value, and which images it was measured on where these were not all."""
    scores = list(scores)
    if not scores:
        return None, ''
    best = max(scores, key=lambda s: s.value if s.greater else -s.value)
    return best.value, '' if best.images >= best.total else best.where


# ---------------------------------------------------------------------- counting
def spread(total: int, wanted: int) -> list[int]:
    """Indices of some items, all over a data set: many are sorted by class."""
    number = min(total, wanted)
    return [i * total // number for i in range(number)]


def label_confusion(labels: Tensor, predicted: Tensor, number: int, columns: int | None = None) -> Tensor:
    """Count predictions per label.

    Args:
        labels: Int64 of any shape; those that are no class (ignored pixels) are left out.
        predicted: Int64 of the same shape.
        number: Of classes.
        columns: Of what may be predicted. Default: the classes.

    Returns:
        ``(number, columns)`` int64 on the processor: rows are labels.
    """
    columns = number if columns is None else columns
    labels, predicted = labels.reshape(-1).long(), predicted.reshape(-1).long()
    keep = (labels >= 0) & (labels < number) & (predicted >= 0) & (predicted < columns)
    counted = torch.bincount(labels[keep] * columns + predicted[keep], minlength=number * columns)
    return counted.view(number, columns).cpu()


def box_confusion(
    boxes: Tensor, labels: Tensor, found: Tensor, scores: Tensor, predicted: Tensor, number: int
) -> Tensor:
    """Count what objects of each class were taken for: by the surest detection that overlaps with one.

    Args:
        boxes: ``(m, 4)`` of the objects of an image, ``x1, y1, x2, y2``.
        labels: ``(m,)`` their classes.
        found: ``(n, 4)`` detected boxes.
        scores: ``(n,)`` of these.
        predicted: ``(n,)`` their classes.
        number: Of classes.

    Returns:
        ``(number, number + 1)`` int64 on the processor: rows are labels, the last column holds the objects that nothing
        overlaps with.
    """
    labels = labels.reshape(-1).long()
    missed = torch.full_like(labels, number)
    if not len(boxes) or not len(found):
        return label_confusion(labels, missed, number, number + 1)
    boxes, found = boxes.float(), found.float().to(boxes.device)
    low = torch.maximum(boxes[:, None, :2], found[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], found[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(-1) for b in (boxes, found)]
    overlap = shared / (areas[0][:, None] + areas[1][None] - shared).clamp(min=1e-9)
    sure = torch.where(overlap >= OVERLAP, scores.to(overlap)[None], overlap.new_tensor(-1.0))
    best, which = sure.max(1)
    taken = torch.where(best >= 0, predicted.to(labels)[which], missed)
    return label_confusion(labels, taken, number, number + 1)


def mean_recall(confusion: Tensor) -> float:
    """Mean over the classes that occur of how much of each is recognised."""
    counts = confusion.sum(1)
    seen = counts > 0
    return float((confusion.diagonal()[seen] / counts[seen]).mean()) if seen.any() else 0.0


def permutation(confusion: Tensor, least: float = PERMUTED) -> dict[int, int] | None:
    """The classes that are taken for another one throughout, ``{class: other}``; None where their order is right.

    A class is taken for another when most of it is, and most of what is taken for that other is of this class: so one
    that everything is taken for is none. Of each class the first finding is not counted, which any order explains.

    Args:
        confusion: ``(C, C)`` int64, rows are labels.
        least: Mean recall that this order must reach.
    """
    rows, columns = confusion.sum(1), confusion.sum(0)
    swapped, ours, theirs = {}, [], []
    for label in (rows > 1).nonzero().flatten().tolist():
        count = int(rows[label])
        other = int(confusion[label].argmax())
        most = int(confusion[label, other])
        kept = int(confusion[label, label]) / count
        ours.append(kept)
        if other == label or 2 * most <= count or 2 * most <= int(columns[other]):
            theirs.append(kept)
            continue
        swapped[label] = other
        theirs.append((most - 1) / (count - 1))
    if len(swapped) < 2:
        return None
    before, after = (sum(values) / len(values) for values in (ours, theirs))
    return swapped if after >= max(least, before + BETTER) else None
