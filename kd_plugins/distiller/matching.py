"""What a term compares: the outputs at its two taps, brought to one form, one grid and the same classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kd_plugins.adapters import as_map, attention_map
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.distiller.taps import Call, Capture, Tap, find_module
from kd_plugins.distiller.terms import Term
from kd_plugins.errors import DistillError
from kd_plugins.predictions import (
    Classes,
    ClassPredictions,
    Form,
    find_reader,
    forms,
    known_head,
    read,
    readable,
)


@dataclass
class Batch:
    """What was captured of one batch, and what is read of it once for several terms.

    Attributes:
        student: The student's taps.
        teachers: The teachers', by name.
        target: Labels, or None.
        read: Predictions by side, tap and form.
        aligned: Pairs of predictions by their taps and form.
        notes: What a term leaves out, by term; filled in the dry run only.
    """

    student: Capture
    teachers: Mapping[str, Capture]
    target: Tensor | None = None
    read: dict[tuple[str, Tap, type[Form]], Form] = field(default_factory=dict)
    aligned: dict[tuple[Tap, Tap, type[Form]], tuple[Form, Form]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


class Matching:
    """Finds for every term what is compared with what.

    Args:
        student: The plain student model.
        teachers: The teachers by name, not their models: copies and pickles of whatever leads here must leave those
            out.
        classes: For each teacher the classes that both know.
        head: Path of the module whose output is what the student predicts, ``''`` when it has none.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, Teacher],
        classes: Mapping[str, Classes],
        head: str = '',
    ) -> None:
        self.student, self.teachers, self.classes, self.head = student, teachers, classes, head
        self._forms: dict[str, type[Form] | None] = {}
        self._paired: dict[str, tuple[tuple[object, ...], list[tuple[int, int]]]] = {}

    def classes_of(self, term: Term) -> Classes:
        """The classes that student and teacher of a term both know."""
        return self.classes.get(term.teacher.owner)

    def by_class(self, term: Term) -> bool:
        """Whether a term compares class by class, so that the classes of both must be matched."""
        form = self.form(term)
        return term.projects or self._whole_head(term) if form is None else form.by_class

    def reads(self, term: Term) -> bool:
        """Whether a term compares whole predictions; False: tensors, see `tensors`."""
        return term.consumes != 'features' and self.form(term) is not None

    def form(self, term: Term) -> type[Form] | None:
        """The form that both sides of a term are read into; None: its tensors are compared as they are."""
        if term.name not in self._forms:
            self._forms[term.name] = self._common_form(term)
        return self._forms[term.name]

    def _common_form(self, term: Term) -> type[Form] | None:
        found = [self._find_form(one) for one in term.each]
        if len(set(found)) > 1:
            shown = ', '.join(
                f'{str(tap)!r} a {"map or vector" if form is None else form.head + " head"}'
                for tap, form in zip(term.taps, found, strict=True)
            )
            raise DistillError(f'its teachers are not of one kind: {shown}; write one term for each.')
        return found[0]

    def sides(self, term: Term) -> tuple[tuple[str, nn.Module, Tap], tuple[str, nn.Module, Tap]]:
        """``(side, module, tap)`` of student and teacher."""
        model = self.teachers[term.teacher.owner].model
        return (
            ('student', find_module(self.student, term.student.module, 'student'), term.student),
            ('teacher', find_module(model, term.teacher.module, 'teacher'), term.teacher),
        )

    def _find_form(self, term: Term) -> type[Form] | None:
        if term.projects:
            # Its student side is a feature.
            return None
        sides = self.sides(term)
        wanted = term.wanted
        if wanted is not None:
            for side, module, tap in sides:
                self._need_reader(side, module, tap, wanted)
                if tap.index is not None:
                    raise DistillError(
                        f'{type(term.loss).__name__} compares whole heads: write {tap.module!r}, not {tap}.'
                    )
            return wanted
        if any(tap.index is not None or tap.also for _, _, tap in sides):
            return None
        if term.consumes == 'features':
            # Logits of a segmentor are maps like others, but their classes have names. Detection heads are many maps.
            candidates = [f for f in forms() if f.as_maps] if term.automatic else []
        else:
            candidates = [f for f in forms() if f.has_class_logits]
        found = next((f for f in candidates if all(readable(module, f) for _, module, _ in sides)), None)
        if found is None and term.consumes == 'logits':
            for side, module, tap in sides:
                # Raw outputs of a head that cannot be read would pass for logits by their shape alone.
                if known_head(module) or (side == 'student' and tap.module == self.head):
                    fitting = next((f for f in candidates if any(readable(m, f) for _, m, _ in sides)), candidates[0])
                    self._need_reader(side, module, tap, fitting)
        return found

    @staticmethod
    def _need_reader(side: str, module: nn.Module, tap: Tap, form: type[Form]) -> None:
        try:
            find_reader(module, form)  # refuses with the heads that can be read
        except DistillError as error:
            raise DistillError(f'{side} {str(tap)!r}: {error}') from error

    def _whole_head(self, term: Term) -> bool:
        """Whether a loss on features compares the maps of heads whose channels are classes."""
        if term.consumes != 'features' or any(tap.index is not None or tap.also for _, _, tap in self.sides(term)):
            return False
        return all(any(readable(m, f) for f in forms() if f.has_class_logits) for _, m, _ in self.sides(term))

    def predictions(self, term: Term, batch: Batch) -> tuple[Form, Form]:
        """Both heads of a term, read into its form and aligned; once for all terms that compare them."""
        form = self.form(term)
        assert form is not None
        key = (term.student, term.teacher, form)
        if key not in batch.aligned:
            ours = self.read('student', batch.student, term.student, form, batch)
            theirs = self.read('teacher', batch.teachers[term.teacher.owner], term.teacher, form, batch)
            batch.aligned[key] = form.align(ours, theirs.detach(), self.classes_of(term))
        return batch.aligned[key]

    @staticmethod
    def read(side: str, capture: Capture, tap: Tap, form: type[Form], batch: Batch) -> Form:
        """What a head at a tap predicts; once for all terms that compare it."""
        key = (side, tap, form)
        if key not in batch.read:
            call: Call = capture.call(tap.module, repeated=form.repeated)
            with torch.autocast(capture.device, enabled=False):
                module = capture.module(tap.module)
                # Dense maps stay in half precision: the loss converts them, piece by piece where it can.
                found = read(module, call.output, training=call.training, form=form, part=tap.part)
                batch.read[key] = found.in_full_precision()
        return batch.read[key]

    def tensors(self, term: Term, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """What a term compares that is not read into predictions: one pair per level, before adapters.

        Raises:
            DistillError: The taps have other numbers of outputs, or nothing that can be compared.
        """
        if self.form(term) is not None:
            ours, theirs = self.predictions(term, batch)
            return [ours.maps(theirs)]
        if term.projects:
            return [self._feature_and_logits(term, batch)]
        if self._whole_head(term) and self.classes_of(term) is not None:
            raise DistillError(
                f'{type(term.loss).__name__} compares {str(term.student)!r} map by map, but the classes of student and '
                "teacher are not the same in the same order; take a loss on whole heads, e.g. 'BinaryKLDivLoss'."
            )
        found = batch.student.maps(term.student), batch.teachers[term.teacher.owner].maps(term.teacher)
        pairs = [(s, t.detach()) for s, t in self._levels(term, *found, batch)]
        if term.consumes == 'features' and term.automatic:
            pairs = [self._maps(term, s, t, batch) for s, t in pairs]
        if term.consumes == 'logits':
            self._check_logits(term, pairs)
        return pairs

    @staticmethod
    def _check_logits(term: Term, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for side, tap, tensors in zip(
            ('student', 'teacher'), (term.student, term.teacher), zip(*pairs, strict=True), strict=True
        ):
            wrong = next((t for t in tensors if t.dim() > 3), None)
            if wrong is not None:
                raise DistillError(
                    f'{type(term.loss).__name__} compares (..., C) logits, but {side} {str(tap)!r} has the map '
                    f'{shapes([wrong])}, whose last side is not the classes; tap the whole head, '
                    "project it (adapter=dict(type='LogitProjector')), or use ChannelWiseDivLoss."
                )
            if len({t.shape[-1] for t in tensors}) > 1:
                raise DistillError(
                    f'{type(term.loss).__name__} compares (..., C) logits, but the tensors of {side} {str(tap)!r}, '
                    f'{shapes(tensors)}, have other last sides; pick one, e.g. {tap.module + "[0]"!r}.'
                )

    def _levels(
        self, term: Term, ours: list[Tensor], theirs: list[Tensor], batch: Batch
    ) -> list[tuple[Tensor, Tensor]]:
        """Tensors of the same level: by stride where both are pyramids, whatever their place in the list."""
        if len(ours) == len(theirs) == 1:
            return [(ours[0], theirs[0])]
        teacher = batch.teachers[term.teacher.owner]
        sizes = batch.student.image_size, teacher.image_size
        key = (*(tuple(t.shape[1:]) for t in (*ours, *theirs)), *sizes)
        known = self._paired.get(term.name)
        if known is None or known[0] != key:
            known = self._paired[term.name] = (key, self._pair_levels(term, ours, theirs, batch))
        return [(ours[i], theirs[j]) for i, j in known[1]]

    @staticmethod
    def _pair_levels(term: Term, ours: list[Tensor], theirs: list[Tensor], batch: Batch) -> list[tuple[int, int]]:
        in_order = [(i, i) for i in range(len(ours))]
        prefixes = term.prefixes
        mine = _scales(ours, batch.student, prefixes[0])
        other = _scales(theirs, batch.teachers[term.teacher.owner], prefixes[1])
        if mine is None or other is None:
            if len(ours) == len(theirs):
                # Sequences and vectors have no stride: their order is what there is.
                return in_order
            raise DistillError(_uneven(term, ours, theirs))
        if mine == other:
            return in_order
        if len(set(mine)) < len(mine) or len(set(other)) < len(other):
            raise DistillError(_uneven(term, ours, theirs, mine, other))
        common = [s for s in mine if s in other]
        if not common:
            raise DistillError(_uneven(term, ours, theirs, mine, other))
        left = [
            f'{_words(rest)} of the {who}'
            for who, found in (('student', mine), ('teacher', other))
            if (rest := [s for s in found if s not in common])
        ]
        if left:
            batch.notes[term.name] = f'term {term.name!r} compares strides {_words(common)}; not {" and ".join(left)}'
        return [(mine.index(s), other.index(s)) for s in common]

    def _feature_and_logits(self, term: Term, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's feature, and the teacher's logits."""
        found = batch.student.maps(term.student)
        if len(found) != 1:
            raise DistillError(
                f'student tap {str(term.student)!r} has {len(found)} tensors {shapes(found)}; pick the feature that '
                f'is to be projected, e.g. {term.student.module + "[0]"!r}.'
            )
        feature = found[0]
        if feature.dim() == 4 and batch.student.image_size is not None:
            feature = as_map(feature, batch.student.image_size)
        return feature, self.teacher_classes(term, batch).logits.detach()

    def teacher_classes(self, term: Term, batch: Batch) -> ClassPredictions:
        """The teacher's class logits that a projected feature is compared with."""
        capture = batch.teachers[term.teacher.owner]
        found = self.read('teacher', capture, term.teacher, ClassPredictions, batch)
        assert isinstance(found, ClassPredictions)
        return found

    @staticmethod
    def _maps(term: Term, ours: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both as (B, C, H, W) maps where one is a map or the sequences differ; otherwise as they are.

        Attention probabilities become maps of what they attend to, one channel per head.
        """
        if ours.dim() == theirs.dim() == 2:
            return ours, theirs
        found = []
        for tensor, capture, tap, tokens in zip(
            (ours, theirs),
            (batch.student, batch.teachers[term.teacher.owner]),
            (term.student, term.teacher),
            term.prefixes,
            strict=True,
        ):
            owner = capture.attention.get(tap.module)
            if owner is None and tensor.dim() == 4 and capture.image_size is None:
                found.append(tensor)
                continue
            # Windows lie in the batch: it is larger than that of the images.
            if owner is not None and ('Window' in type(owner).__name__ or len(ours) != len(theirs)):
                raise DistillError(
                    f'{capture.where} {str(tap)!r}: {type(owner).__name__} attends within windows of the image, so '
                    'there is no map of where the whole image is attended to; tap the attention of a ViT, or features.'
                )
            try:
                if capture.image_size is None:
                    raise DistillError(
                        'the batch is no tensor of images, so its tokens have no known grid; tap (B, C, H, W) maps, or '
                        'write an adapter of your own.'
                    )
                to_map = as_map if owner is None else attention_map
                found.append(to_map(tensor, capture.image_size, tokens))
            except DistillError as error:
                if ours.dim() == theirs.dim() == 3 and ours.shape[1] == theirs.shape[1]:
                    # Queries and the like.
                    batch.notes.setdefault(
                        term.name,
                        f'term {term.name!r} compares sequences without a grid (queries): one by one, in order',
                    )
                    return ours, theirs
                raise DistillError(f'{capture.where} {str(tap)!r}: {error}') from error
        return found[0], found[1]


def refuse_layers_of_logits(term: Term, batch: Batch, heads: Mapping[str, Sequence[tuple[str, Form]]]) -> None:
    """Refuse taps on a layer that makes the class logits of a head: as features, classes would be taken by number.

    Args:
        term: A term on tensors.
        batch: The dry run's.
        heads: ``(path, predictions)`` of the readable heads that a tap lies in, by side.

    Raises:
        DistillError: A tap is such a layer; the head is named.
    """
    sides = (('student', batch.student, term.student), ('teacher', batch.teachers[term.teacher.owner], term.teacher))
    for side, capture, tap in sides:
        for path, found in heads.get(side, ()):
            if tap.module.startswith(f'{path}.') and any(found.made_of(t) for t in capture.maps(tap)):
                raise DistillError(
                    f'{side} {str(tap)!r} is what makes the class logits of {path!r}, whose classes have names; write '
                    f'{path!r}, so that they are matched.'
                )


def _scales(maps: Sequence[Tensor], capture: Capture, prefix: int | None) -> list[int] | None:
    """log2 of the stride of every map, rounded; None where not all are maps, or the image size is unknown."""
    if capture.image_size is None:
        return None
    # The taller side is the more precise one.
    side = 0 if capture.image_size[0] >= capture.image_size[1] else 1
    try:
        grids = [as_map(t, capture.image_size, prefix).shape[-2:] for t in maps]
    except DistillError:
        return None
    return [round(math.log2(capture.image_size[side] / grid[side])) for grid in grids]


def _words(scales: Sequence[int]) -> str:
    return '/'.join(f'{2.0**s:g}' for s in scales)


def _uneven(
    term: Term,
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    mine: Sequence[int] | None = None,
    other: Sequence[int] | None = None,
) -> str:
    strides = ('', '') if mine is None or other is None else (f' at strides {_words(mine)}', f' at {_words(other)}')
    return (
        f'student tap {str(term.student)!r} has {len(ours)} tensors {shapes(ours)}{strides[0]} but teacher tap '
        f'{str(term.teacher)!r} has {len(theirs)} {shapes(theirs)}{strides[1]}; pick levels, e.g. '
        f'student={term.student.module + "[0]"!r}, teacher={term.teacher.module + "[0]"!r}.'
    )


def shapes(tensors: Sequence[Tensor]) -> str:
    """Sizes without the batch, for messages and the summary: ``64x8x8, 128x4x4``."""
    shown = ', '.join('x'.join(map(str, t.shape[1:])) for t in tensors[:5])
    return shown + (', ...' if len(tensors) > 5 else '')
