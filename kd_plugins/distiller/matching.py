"""What a term compares: the outputs at its two taps, brought to one form, one grid and the same classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kd_plugins.adapters import as_map, attention_map
from kd_plugins.distiller.calling import Classes, Predictions
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.distiller.taps import Call, Capture, find_module
from kd_plugins.distiller.terms import Term
from kd_plugins.errors import DistillError
from kd_plugins.predictions import (
    ClassPredictions,
    DensePredictions,
    PixelPredictions,
    align,
    align_classes,
    align_pixels,
    common_grid,
    find_reader,
    read,
    readable,
)

#: Forms of the losses that take whole heads, by what they consume.
FORMS: dict[str, type[Predictions]] = {'predictions': DensePredictions, 'segmentation': PixelPredictions}
_ALIGN = {DensePredictions: align, PixelPredictions: align_pixels, ClassPredictions: align_classes}


@dataclass
class Batch:
    """What was captured of one batch, and what is read of it once for several terms.

    Attributes:
        student: The student's taps.
        teacher: The teacher's.
        target: Labels, or None.
        read: Predictions by side and module.
        aligned: Pairs of predictions by their modules.
    """

    student: Capture
    teacher: Capture
    target: Tensor | None = None
    read: dict[tuple[str, str], Predictions] = field(default_factory=dict)
    aligned: dict[tuple[str, str], tuple[Predictions, Predictions]] = field(default_factory=dict)


class Matching:
    """Finds for every term what is compared with what.

    Args:
        student: The plain student model.
        teacher: The teacher itself, not its model: copies and pickles of whatever leads here must leave it out.
        classes: ``(student_index, teacher_index)`` of the classes both know, or None when the sets are equal.
    """

    def __init__(self, student: nn.Module, teacher: Teacher, classes: Classes = None) -> None:
        self.student, self.teacher, self.classes = student, teacher, classes
        self._forms: dict[str, type[Predictions] | None] = {}

    def by_class(self, term: Term) -> bool:
        """Whether a term compares class by class, so that the classes of both must be matched."""
        return term.consumes in FORMS or term.projects or self.form(term) is not None

    def reads(self, term: Term) -> bool:
        """Whether a term compares whole predictions; False: tensors, see `tensors`."""
        return term.consumes != 'features' and self.form(term) is not None

    def form(self, term: Term) -> type[Predictions] | None:
        """The form that both sides of a term are read into; None: its tensors are compared as they are."""
        if term.name not in self._forms:
            self._forms[term.name] = self._find_form(term)
        return self._forms[term.name]

    def _find_form(self, term: Term) -> type[Predictions] | None:
        sides = (
            ('student', find_module(self.student, term.student.module, 'student'), term.student),
            ('teacher', find_module(self.teacher.model, term.teacher.module, 'teacher'), term.teacher),
        )
        if term.projects:
            # Its student side is a feature.
            return None
        wanted = FORMS.get(term.consumes)
        if wanted is not None:
            for _, module, tap in sides:
                find_reader(module, wanted)  # refuses with the heads that can be read
                if tap.index is not None:
                    raise DistillError(
                        f'{type(term.loss).__name__} compares whole heads: write {tap.module!r}, not {tap}.'
                    )
            return wanted
        if any(tap.index is not None for _, _, tap in sides):
            return None
        if term.consumes == 'features':
            # Logits of a segmentor are maps like others, but their classes have names. Detection heads are many maps.
            forms = (PixelPredictions,) if term.automatic else ()
        else:
            forms = (DensePredictions, PixelPredictions, ClassPredictions)
        return next((f for f in forms if all(readable(module, f) for _, module, _ in sides)), None)

    def predictions(self, term: Term, batch: Batch) -> tuple[Predictions, Predictions]:
        """Both heads of a term, read into its form and aligned; once for all terms that compare them."""
        form = self.form(term)
        key = (term.student.module, term.teacher.module)
        if key not in batch.aligned:
            sides = []
            for side, capture, path in (('student', batch.student, key[0]), ('teacher', batch.teacher, key[1])):
                if (side, path) not in batch.read:
                    # mmseg's cascades run a stage again to feed the next one.
                    call: Call = capture.call(path, repeated=form is PixelPredictions)
                    device = next(t.device for t in capture.maps(term.student if side == 'student' else term.teacher))
                    with torch.autocast(device.type, enabled=False):
                        found = read(capture.modules[path], call.output, training=call.training, form=form)
                        # Dense maps stay in half precision: the loss converts them, piece by piece where it can.
                        batch.read[side, path] = found.float() if isinstance(found, DensePredictions) else found
                sides.append(batch.read[side, path])
            batch.aligned[key] = _ALIGN[form](sides[0], sides[1].detach(), self.classes)
        return batch.aligned[key]

    def tensors(self, term: Term, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """What a term compares that is not read into predictions: one pair per level, before adapters.

        Raises:
            DistillError: The taps have other numbers of outputs, or nothing that can be compared.
        """
        if self.form(term) is PixelPredictions:
            ours, theirs = common_grid(*self.predictions(term, batch))
            return [(ours.logits, theirs.logits)]
        if term.projects:
            return [self._feature_and_logits(term, batch)]
        ours, theirs = batch.student.maps(term.student), batch.teacher.maps(term.teacher)
        if len(ours) != len(theirs):
            raise DistillError(
                f'student tap {str(term.student)!r} has {len(ours)} tensors {shapes(ours)} but teacher tap '
                f'{str(term.teacher)!r} has {len(theirs)} {shapes(theirs)}; pick levels, e.g. '
                f'student={term.student.module + "[0]"!r}, teacher={term.teacher.module + "[0]"!r}.'
            )
        pairs = [(s, t.detach()) for s, t in zip(ours, theirs, strict=True)]
        if term.consumes == 'features' and term.automatic:
            pairs = [self._maps(term, s, t, batch) for s, t in pairs]
        if term.consumes == 'logits' and pairs[0][0].dim() > 3:
            raise DistillError(
                f'{type(term.loss).__name__} compares (..., C) logits, but {str(term.student)!r} is the map '
                f'{shapes([pairs[0][0]])}, whose last side is not the classes; tap the whole head, '
                "project it (adapter=dict(type='LogitProjector')), or use ChannelWiseDivLoss."
            )
        return pairs

    def _feature_and_logits(self, term: Term, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's feature, and the teacher's logits."""
        found, path = batch.student.maps(term.student), term.teacher.module
        if len(found) != 1:
            raise DistillError(
                f'student tap {str(term.student)!r} has {len(found)} tensors {shapes(found)}; pick the feature that '
                f'is to be projected, e.g. {term.student.module + "[0]"!r}.'
            )
        feature = found[0]
        if feature.dim() == 4 and batch.student.image_size is not None:
            feature = as_map(feature, batch.student.image_size)
        if ('teacher', path) not in batch.read:
            call = batch.teacher.call(path)
            predictions = read(batch.teacher.modules[path], call.output, training=call.training, form=ClassPredictions)
            batch.read['teacher', path] = predictions
        return feature, batch.read['teacher', path].logits.detach()

    @staticmethod
    def _maps(term: Term, ours: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both as (B, C, H, W) maps where one is a map or the sequences differ; otherwise as they are.

        Attention probabilities become maps of what they attend to, one channel per head.
        """
        if ours.dim() == theirs.dim() == 2:
            return ours, theirs
        prefix = term.automatic.get('prefix_tokens')
        prefixes = prefix if isinstance(prefix, (tuple, list)) else (prefix, prefix)
        found = []
        for side, tensor, capture, tokens in zip(
            ('student', 'teacher'), (ours, theirs), (batch.student, batch.teacher), prefixes, strict=True
        ):
            tap = term.student if side == 'student' else term.teacher
            owner = capture.attention.get(tap.module)
            if owner is None and tensor.dim() == 4 and capture.image_size is None:
                found.append(tensor)
                continue
            # Windows lie in the batch: it is larger than that of the images.
            if owner is not None and ('Window' in type(owner).__name__ or len(ours) != len(theirs)):
                raise DistillError(
                    f'{side} {str(tap)!r}: {type(owner).__name__} attends within windows of the image, so there is no '
                    'map of where the whole image is attended to; tap the attention of a ViT, or features.'
                )
            try:
                to_map = as_map if owner is None else attention_map
                found.append(to_map(tensor, capture.image_size, tokens))
            except DistillError as error:
                if ours.dim() == theirs.dim() == 3 and ours.shape[1] == theirs.shape[1]:
                    # Queries and the like: a sequence without a grid, paired in order.
                    return ours, theirs
                raise DistillError(f'{side} {str(tap)!r}: {error}') from error
        return found[0], found[1]


def shapes(tensors: Sequence[Tensor]) -> str:
    """Sizes without the batch, for messages and the summary: ``64x8x8, 128x4x4``."""
    shown = ', '.join('x'.join(map(str, t.shape[1:])) for t in tensors[:5])
    return shown + (', ...' if len(tensors) > 5 else '')


def describe(p: Predictions) -> str:
    """Predictions in words, for the summary."""
    if isinstance(p, ClassPredictions):
        return f'{p.num_classes} classes'
    if isinstance(p, PixelPredictions):
        return f'{p.num_classes} classes, ' + 'x'.join(map(str, p.logits.shape[1:]))
    parts = [f'{p.num_classes} classes']
    parts += [n for n in ('obj', 'box', 'dist') if getattr(p, n) is not None]
    if p.box is None and p.ltrb is not None:
        parts.append('ltrb')
    strides = '/'.join(f'{s:g}' for s in p.strides)
    return f'{p.cls.shape[1]} positions, strides {strides}, ' + '+'.join(parts)
