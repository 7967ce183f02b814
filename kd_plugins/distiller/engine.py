"""The distiller: from what was captured in student and teacher to weighted, named losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.adapters import as_map, attention_map, auto_adapter, describe_adapter
from kd_plugins.distiller.bank import AdapterBank
from kd_plugins.distiller.summary import Row, count
from kd_plugins.distiller.taps import Call, Capture, find_module
from kd_plugins.distiller.teacher import Teacher
from kd_plugins.distiller.terms import Resolver, Term, build_adapter
from kd_plugins.errors import DistillError
from kd_plugins.losses import BinaryKLDivLoss, DISTLoss, DKDLoss, HardLabelLoss, KLDivLoss, OFALoss
from kd_plugins.predictions import (
    ClassPredictions,
    DensePredictions,
    PixelPredictions,
    align,
    align_classes,
    align_pixels,
    common_grid,
    find_reader,
    map_class_labels,
    map_labels,
    read,
    readable,
)

Classes = tuple[Sequence[int], Sequence[int]] | None
Predictions = DensePredictions | PixelPredictions | ClassPredictions
#: ``targets(inputs, samples)``: the labels of a batch, or None when there are none.
Targets = Callable[[Any, Any], Tensor | None]
FORMS: dict[str, type[DensePredictions] | type[PixelPredictions]] = {
    'predictions': DensePredictions,
    'segmentation': PixelPredictions,
}


class CannotRunError(DistillError):
    """A model does not take the images of the start-up check; another size may do."""


@dataclass
class Position:
    """Where in the run the next iteration is.

    Attributes:
        iteration: Iterations done.
        max_iterations: Iterations of the whole run.
        unit: Epochs done in an epoch-based run, otherwise iterations: what ``start`` and ``stop`` are counted in.
    """

    iteration: int = 0
    max_iterations: int = 1
    unit: int = 0

    @property
    def progress(self) -> float:
        """Fraction of the run that is done, in [0, 1]."""
        return min(self.iteration / max(self.max_iterations, 1), 1.0)


@dataclass
class _Shared:
    """What is read once per iteration and used by several terms.

    Attributes:
        target: Labels of the batch, or None.
        read: Predictions by side and module.
        aligned: Pairs of predictions by their modules.
    """

    target: Tensor | None = None
    read: dict[tuple[str, str], Predictions] = field(default_factory=dict)
    aligned: dict[tuple[str, str], tuple[Predictions, Predictions]] = field(default_factory=dict)


class Distiller:
    """Turns captured tensors into KD losses.

    Args:
        student: The plain student model (unwrapped).
        teacher: The teacher.
        terms: Terms by name.
        classes: ``(student_index, teacher_index)`` of the classes both know, or None when the sets are equal.
        start: First epoch (iteration in an iteration-based run) with KD.
        stop: First epoch (iteration) without it again, or None.
        alpha: Balance of the run: ``alpha`` times the KD losses and ``1 - alpha`` times the student's own, while KD is
            on. None: both as they are.
        targets: Gives the labels of a batch to losses that need them.
        resolve: Looks up adapter names that are not ours.

    Attributes:
        bank: The trainable adapters; empty for parameter-free terms.
        position: Where in the run the next iteration is; set by the framework side.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        terms: dict[str, Term],
        *,
        classes: Classes = None,
        start: int = 0,
        stop: int | None = None,
        alpha: float | None = None,
        targets: Targets | None = None,
        resolve: Resolver | None = None,
        bank: AdapterBank | None = None,
    ) -> None:
        self.student, self.teacher, self.terms, self.classes = student, teacher, terms, classes
        self.start, self.stop, self.alpha = start, stop, alpha
        self._targets = targets
        self.bank = bank if bank is not None else AdapterBank()
        self._resolve = resolve
        self._free: dict[str, nn.ModuleList] = {}
        self._forms: dict[str, type[Predictions] | None] = {}
        self.position = Position()
        for term in terms.values():
            held = self.bank._modules.get(term.name)
            if held is not None and 'loss' in held:
                term.loss = held['loss']

    @property
    def student_modules(self) -> list[str]:
        """Paths that are tapped in the student."""
        return list(dict.fromkeys(t.student.module for t in self.terms.values()))

    def capture(self) -> Capture:
        """A capture of the student's taps; opened around its forward pass."""
        return Capture(self.student, self.student_modules, 'student')

    @property
    def active(self) -> bool:
        """Whether KD is on at the current position: between ``start`` and ``stop``, with a weight above 0."""
        now = self.position.unit
        if now < self.start or (self.stop is not None and now >= self.stop) or self.alpha == 0:
            return False
        return any(self.weight(t) > 0 for t in self.terms.values())

    def teaches(self, module: str) -> bool:
        """Whether a student module is tapped by a term that is on at the current position."""
        return self.active and any(t.student.module == module and self.weight(t) > 0 for t in self.terms.values())

    def weight(self, term: Term) -> float:
        """A term's weight at the current position."""
        return term.weight(self.position.progress)

    # ------------------------------------------------------------------ before the first iteration
    def check_heads(self) -> None:
        """Refuse terms on whole heads that cannot be read.

        Raises:
            DistillError: A head has no reader for what the term's loss compares.
        """
        for term in self.terms.values():
            if term.consumes in FORMS:
                for side, model, tap in (
                    ('student', self.student, term.student),
                    ('teacher', self.teacher.model, term.teacher),
                ):
                    module = find_module(model, tap.module, side)
                    try:
                        find_reader(module, FORMS[term.consumes])
                    except DistillError as error:
                        raise DistillError(f'term {term.name!r}: {side} {tap.module!r}: {error}') from error

    def dry_run(
        self,
        inputs: Tensor,
        samples: Any,
        run_student: Callable[[nn.Module, Tensor, Any, Sequence[str]], None],
        build_adapters: bool = True,
        check_values: bool = True,
    ) -> list[Row]:
        """Run both models once without gradients, build what adapters are needed and check that every term fits.

        Neither weights, buffers, modes nor random generators change.

        Args:
            inputs: ``(B, 3, H, W)`` a batch as the student's data preprocessor would return it.
            samples: Data samples for it, or None.
            run_student: ``run_student(model, inputs, samples, modules)`` computes what the tapped modules need.
            build_adapters: False to only check with the adapters that are there.
            check_values: False to accept any value from the teacher, whose weights may be random.

        Returns:
            One row per term for the summary table.

        Raises:
            DistillError: A tap does not run or shapes do not fit.
        """
        # Before anything runs: some of these models cannot even be run without annotations.
        self.check_heads()
        modes = [(m, m.training) for m in self.student.modules()]
        capture = self.capture()
        try:
            self.student.eval()
            for module in capture.modules.values():
                if readable(module):
                    # Only the head's own flag: it returns its training form while BN statistics stay. Heads of
                    # segmentors stay in evaluation: their training form needs a backbone in training as well.
                    module.training = True
            # With gradients, to see which taps have one.
            with torch.enable_grad(), capture, _running('student', self.student, inputs):
                capture.image_size = tuple(inputs.shape[-2:])
                run_student(self.student, inputs, samples, tuple(capture.modules))
        finally:
            for module, training in modes:
                module.training = training
        shared = _Shared(target=self._labels(inputs, samples))
        with torch.no_grad():
            with _running('teacher', self.teacher.model, inputs):
                taught = self._run_teacher(inputs, samples, list(self.terms.values()))
            rows = [self._check_term(term, capture, taught, build_adapters, shared) for term in self.terms.values()]
            if check_values:
                for term in self.terms.values():
                    self._refuse_nan(term, capture, taught, shared)
        return rows

    def _check_term(self, term: Term, student: Capture, teacher: Capture, build: bool, shared: _Shared) -> Row:
        where = f'term {term.name!r}'
        try:
            form = self._form(term)
            if not term.always_zero:
                _refuse_frozen(term, student.maps(term.student))
            if form is not None and term.consumes != 'features':
                if build and not self._has_parts(term):
                    self._keep(term, nn.ModuleList())
                s, t = self._predictions(term, student, teacher, shared, form)
                value = self._call_loss(term, s, t, shared)
                shapes = _describe(s), _describe(t)
                adapter = 'none'
            else:
                pairs = self._pairs(term, student, teacher, shared, form)
                if build and not self._has_parts(term):
                    self._build_adapters(term, pairs)
                with _evaluating(self._parts(term)):
                    value = self._tensor_loss(term, pairs, student, shared)
                shapes = _shapes([p[0] for p in pairs]), _shapes([p[1] for p in pairs])
                adapter = self._describe_adapters(term, pairs)
        except DistillError as error:
            raise DistillError(f'{where}: {error}') from error
        except Exception as error:
            sides = [f'{tap} ({_shapes(c.maps(tap))})' for c, tap in ((student, term.student), (teacher, term.teacher))]
            raise DistillError(
                f'{where}: its adapter or {type(term.loss).__name__} fails on student {sides[0]} and teacher '
                f'{sides[1]}: {_in_words(error)}; correct their options.'
            ) from error
        if value.dim() != 0:
            raise DistillError(f'{where}: {type(term.loss).__name__} must return a scalar, got {tuple(value.shape)}.')
        return Row(
            name=term.name,
            loss=type(term.loss).__name__,
            student=str(term.student),
            student_shape=shapes[0],
            teacher=str(term.teacher),
            teacher_shape=shapes[1],
            adapter=adapter,
            parameters=sum(p.numel() for p in self._parts(term).parameters()),
            weight=str(term.weight),
        )

    def _refuse_nan(self, term: Term, student: Capture, teacher: Capture, shared: _Shared) -> None:
        tensors = teacher.maps(term.teacher)
        if self._form(term) is DensePredictions:
            # Large raw outputs are finite, but the boxes decoded from them may not be.
            _, decoded = self._predictions(term, student, teacher, shared, DensePredictions)
            tensors = [*tensors, *(t for t in (decoded.cls, decoded.obj, decoded.ltrb) if t is not None)]
        for tensor in tensors:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DistillError(
                    f'term {term.name!r}: the teacher returns NaN or infinite values at {str(term.teacher)!r}; '
                    'its checkpoint is damaged, or its normalisation or precision is wrong.'
                )

    def _build_adapters(self, term: Term, pairs: list[tuple[Tensor, Tensor]]) -> None:
        built: list[nn.Module] = []
        for student, teacher in pairs:
            if term.projects:
                adapter = build_adapter(term, term.adapter, 'adapter', self._resolve)
            elif term.consumes != 'features' or term.adapter is None or getattr(term.loss, 'any_grid', False):
                adapter = None
            elif term.automatic:
                channels = not getattr(term.loss, 'any_channels', False)
                options = {k: v for k, v in term.automatic.items() if k != 'prefix_tokens'}
                adapter = auto_adapter(tuple(student.shape), tuple(teacher.shape), channels=channels, **options)
            else:
                adapter = build_adapter(term, term.adapter, 'adapter', self._resolve)
            if hasattr(adapter, 'for_shapes'):
                adapter = adapter.for_shapes(tuple(student.shape), tuple(teacher.shape))
            built.append(_Identity() if adapter is None else adapter)
        losses = None
        if hasattr(term.loss, 'for_channels'):
            # A loss with parts of its own is built once per level, for what the adapter hands it.
            losses = nn.ModuleList([term.loss.for_channels(teacher.shape[1]) for _, teacher in pairs])
        self._keep(term, nn.ModuleList(built), losses)

    def _keep(self, term: Term, adapters: nn.ModuleList, losses: nn.ModuleList | None = None) -> None:
        parts = nn.ModuleDict({'adapters': adapters})
        if losses is not None:
            parts['losses'] = losses
        elif _trainable(term.loss):
            parts['loss'] = term.loss
        if _trainable(parts):
            self.bank.add_module(term.name, parts)
        else:
            self._free[term.name] = parts

    def _has_parts(self, term: Term) -> bool:
        return term.name in self._free or term.name in self.bank._modules

    def _parts(self, term: Term) -> nn.ModuleDict:
        parts = self.bank._modules.get(term.name) or self._free.get(term.name)
        return parts if parts is not None else _NONE

    def _adapters(self, term: Term) -> nn.ModuleList:
        return self._parts(term)['adapters']

    def _describe_adapters(self, term: Term, pairs: list[tuple[Tensor, Tensor]]) -> str:
        words = [
            describe_adapter(None if isinstance(a, _Identity) else a, tuple(s.shape), tuple(t.shape))
            for a, (s, t) in zip(self._adapters(term), pairs, strict=True)
        ]
        if 'losses' in self._parts(term):
            own = [
                f'{type(m).__name__} {count(sum(p.numel() for p in m.parameters()))}'
                for m in self._parts(term)['losses']
            ]
            words = [f'{word}, {part}' if word != 'none' else part for word, part in zip(words, own, strict=True)]
        return '; '.join(dict.fromkeys(words)) or 'none'

    # ------------------------------------------------------------------ every iteration
    def losses(self, capture: Capture, inputs: Any, samples: Any) -> dict[str, Tensor]:
        """The weighted KD losses of one iteration.

        Args:
            capture: The closed capture of the student's forward pass.
            inputs: The batch the student saw.
            samples: Its data samples.

        Returns:
            ``loss_kd_<name>`` for every term (a constant 0 while the term is off), with gradients to the student.

        Raises:
            DistillError: A tap did not run, carries no gradient, or the teacher returned NaN.
        """
        device = _device(inputs, self.student)
        live = [t for t in self.terms.values() if self.active and self.weight(t) > 0]
        result = {f'loss_kd_{name}': torch.zeros((), device=device) for name in self.terms}
        if live:
            capture.image_size = tuple(inputs.shape[-2:]) if isinstance(inputs, Tensor) else None
            taught = self._run_teacher(inputs, samples, live)
            shared = _Shared(target=self._labels(inputs, samples) if any(map(self._needs_labels, live)) else None)
            for term in live:
                if term.temperature is not None:
                    term.loss.temperature = term.temperature(self.position.progress)
                try:
                    value = self._term_loss(term, capture, taught, shared)
                except DistillError as error:
                    raise DistillError(f'term {term.name!r}: {error}') from error
                balance = 1.0 if self.alpha is None else self.alpha
                result[f'loss_kd_{term.name}'] = value * (self.weight(term) * balance)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # DDP waits for a gradient of every parameter: adapters that are out of use contribute zero. Without DDP
            # they get none, because more summands, even zeros, change the last bits of the norm that clip_grad takes.
            for name, modules in self.bank.named_children():
                if name not in {term.name for term in live}:
                    key = f'loss_kd_{name}'
                    result[key] = result[key] + sum(p.sum() * 0 for p in modules.parameters())
        return result

    def _run_teacher(self, inputs: Any, samples: Any, terms: Sequence[Term]) -> Capture:
        self.teacher.to(_like(inputs, self.student))
        return self.teacher(inputs, samples, [t.teacher.module for t in terms])

    def _needs_labels(self, term: Term) -> bool:
        # Images of a class that the teacher does not know are left out.
        partly = self.classes is not None and (term.projects or self._form(term) is ClassPredictions)
        return partly or getattr(term.loss, 'needs_target', False)

    def _labels(self, inputs: Any, samples: Any) -> Tensor | None:
        return self._targets(inputs, samples) if self._targets is not None else None

    def _term_loss(self, term: Term, student: Capture, teacher: Capture, shared: _Shared) -> Tensor:
        form = self._form(term)
        if form is not None and term.consumes != 'features':
            s, t = self._predictions(term, student, teacher, shared, form)
            source = s.cls if isinstance(s, DensePredictions) else s.logits
            value = self._call_loss(term, s, t, shared)
        else:
            pairs = self._pairs(term, student, teacher, shared, form)
            source = pairs[0][0]
            value = self._tensor_loss(term, pairs, student, shared)
        if torch.is_grad_enabled():
            # Again: other than in the dry run, the model trains now, and may have been frozen since.
            _refuse_frozen(term, [source])
        return value

    @property
    def by_class(self) -> bool:
        """Whether a term compares class by class, so that the classes of student and teacher must be matched."""
        return any(t.consumes in FORMS or t.projects or self._form(t) is not None for t in self.terms.values())

    def _form(self, term: Term) -> type[Predictions] | None:
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

    def _predictions(
        self, term: Term, student: Capture, teacher: Capture, shared: _Shared, form: type[Predictions]
    ) -> tuple[Predictions, Predictions]:
        key = (term.student.module, term.teacher.module)
        if key not in shared.aligned:
            sides = []
            for side, capture, path in (('student', student, key[0]), ('teacher', teacher, key[1])):
                if (side, path) not in shared.read:
                    # mmseg's cascades run a stage again to feed the next one.
                    call: Call = capture.call(path, repeated=form is PixelPredictions)
                    device = next(t.device for t in capture.maps(term.student if side == 'student' else term.teacher))
                    with torch.autocast(device.type, enabled=False):
                        found = read(capture.modules[path], call.output, training=call.training, form=form)
                        # Dense maps stay in half precision: the loss converts them, piece by piece where it can.
                        shared.read[side, path] = found.float() if isinstance(found, DensePredictions) else found
                sides.append(shared.read[side, path])
            shared.aligned[key] = _ALIGN[form](sides[0], sides[1].detach(), self.classes)
        return shared.aligned[key]

    def _call_loss(self, term: Term, student: Predictions, teacher: Predictions, shared: _Shared) -> Tensor:
        loss = term.loss
        device = student.cls.device if isinstance(student, DensePredictions) else student.logits.device
        with torch.autocast(device.type, enabled=False):
            if isinstance(student, PixelPredictions):
                return self._call_on_pixels(loss, student, teacher, shared)
            if isinstance(student, ClassPredictions):
                return self._call_on_classes(loss, student, teacher, shared)
            if term.consumes == 'predictions':
                return loss(student, teacher)
            # A loss on logits may know what to make of a whole head (its objectness, for one).
            if hasattr(loss, 'from_predictions'):
                return loss.from_predictions(student, teacher)
            return loss(student.class_logits(), teacher.class_logits())

    def _call_on_classes(
        self, loss: nn.Module, student: ClassPredictions, teacher: ClassPredictions, shared: _Shared
    ) -> Tensor:
        kind = student.activation
        if any(isinstance(loss, types) and kind not in (right, 'either') for right, types in _KINDS.items()):
            other = 'BinaryKLDivLoss' if kind == 'sigmoid' else 'KLDivLoss'
            raise DistillError(
                f'{type(loss).__name__} does not suit this classifier, whose classes are {_KIND_WORDS[kind]}; write '
                f"loss=dict(type='{other}')."
            )
        ours, theirs, target = _full(student.logits), _full(teacher.logits), shared.target
        if self.classes is not None and kind != 'sigmoid' and target is not None:
            target, known = map_class_labels(target, self.classes[0])
            ours, theirs, target = ours[known], theirs[known], target[known]
            if not len(ours):
                # Not one image of this batch is of a class that the teacher knows.
                return student.logits.sum() * 0
        return loss(ours, theirs, target) if getattr(loss, 'needs_target', False) else loss(ours, theirs)

    def _call_on_pixels(
        self, loss: nn.Module, student: PixelPredictions, teacher: PixelPredictions, shared: _Shared
    ) -> Tensor:
        name = type(loss).__name__
        if getattr(loss, 'consumes', None) != 'segmentation':
            if getattr(loss, 'needs_target', False):
                raise DistillError(f'{name} does not know which pixels to ignore; use PixelwiseKLDivLoss.')
            kind = 'softmax' if student.binary else student.activation
            if any(isinstance(loss, types) and kind != right for right, types in _KINDS.items()):
                raise DistillError(
                    f'{name} does not suit these heads, whose classes are {_KIND_WORDS[kind]}; write '
                    f"loss=dict(type='PixelwiseKLDivLoss', sigmoid={kind == 'sigmoid'})."
                )
            student, teacher = common_grid(student, teacher)
            return loss(_full(student.class_logits()), _full(teacher.class_logits()))
        many = student.activation == 'sigmoid' and not student.binary
        if hasattr(loss, 'sigmoid') and loss.sigmoid != many and not student.binary:
            raise DistillError(
                f'{name} has sigmoid={loss.sigmoid}, but the classes of these heads are '
                f'{_KIND_WORDS[student.activation]}; write '
                f"loss=dict(type='{name}', sigmoid={many})."
            )
        if not getattr(loss, 'needs_target', False):
            return loss(student.logits, teacher.logits)
        target = shared.target
        if target is not None:
            ours = None if self.classes is None else self.classes[0]
            target = map_labels(target, ours, (student.ignore_index,), getattr(loss, 'ignore_index', 255))
        return loss(student.logits, teacher.logits, target)

    def _pairs(
        self, term: Term, student: Capture, teacher: Capture, shared: _Shared, form: type[Predictions] | None
    ) -> list[tuple[Tensor, Tensor]]:
        if form is PixelPredictions:
            ours, theirs = common_grid(*self._predictions(term, student, teacher, shared, form))
            return [(ours.logits, theirs.logits)]
        if term.projects:
            return [self._feature_and_classes(term, student, teacher, shared)]
        ours, theirs = student.maps(term.student), teacher.maps(term.teacher)
        if len(ours) != len(theirs):
            raise DistillError(
                f'student tap {str(term.student)!r} has {len(ours)} tensors {_shapes(ours)} but teacher tap '
                f'{str(term.teacher)!r} has {len(theirs)} {_shapes(theirs)}; pick levels, e.g. '
                f'student={term.student.module + "[0]"!r}, teacher={term.teacher.module + "[0]"!r}.'
            )
        pairs = [(s, t.detach()) for s, t in zip(ours, theirs, strict=True)]
        if term.consumes == 'features' and term.automatic:
            pairs = [self._maps(term, s, t, student, teacher) for s, t in pairs]
        if term.consumes == 'logits' and pairs[0][0].dim() > 3:
            raise DistillError(
                f'{type(term.loss).__name__} compares (..., C) logits, but {str(term.student)!r} is the map '
                f'{_shapes([pairs[0][0]])}, whose last side is not the classes; tap the whole head, or use '
                'ChannelWiseDivLoss.'
            )
        return pairs

    def _feature_and_classes(
        self, term: Term, student: Capture, teacher: Capture, shared: _Shared
    ) -> tuple[Tensor, Tensor]:
        """The student's feature, and the teacher's logits."""
        found, path = student.maps(term.student), term.teacher.module
        if len(found) != 1:
            raise DistillError(
                f'student tap {str(term.student)!r} has {len(found)} tensors {_shapes(found)}; pick the feature that '
                f'is to be projected, e.g. {term.student.module + "[0]"!r}.'
            )
        feature = found[0]
        if feature.dim() == 4 and student.image_size is not None:
            feature = as_map(feature, student.image_size)
        if ('teacher', path) not in shared.read:
            call = teacher.call(path)
            predictions = read(teacher.modules[path], call.output, training=call.training, form=ClassPredictions)
            shared.read['teacher', path] = predictions
        return feature, shared.read['teacher', path].logits.detach()

    @staticmethod
    def _maps(term: Term, ours: Tensor, theirs: Tensor, student: Capture, teacher: Capture) -> tuple[Tensor, Tensor]:
        """Both as (B, C, H, W) maps where one is a map or the sequences differ; otherwise as they are.

        Attention probabilities become maps of what they attend to, one channel per head.
        """
        if ours.dim() == theirs.dim() == 2:
            return ours, theirs
        prefix = term.automatic.get('prefix_tokens')
        prefixes = prefix if isinstance(prefix, (tuple, list)) else (prefix, prefix)
        found = []
        for side, tensor, capture, tokens in zip(
            ('student', 'teacher'), (ours, theirs), (student, teacher), prefixes, strict=True
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

    def _tensor_loss(self, term: Term, pairs: list[tuple[Tensor, Tensor]], capture: Capture, shared: _Shared) -> Tensor:
        parts = self._parts(term)
        adapters = parts['adapters']
        values = []
        for level, (student, teacher) in enumerate(pairs):
            if len(adapters):
                adapter = adapters[level]
                more = {'image_size': capture.image_size} if getattr(adapter, 'needs_image_size', False) else {}
                student = adapter(student, teacher, **more)
            if term.consumes == 'features' and student.dim() == teacher.dim() == 3:
                # Channels second, as in maps.
                student, teacher = student.transpose(1, 2), teacher.transpose(1, 2)
            if not _fit(term.loss, student, teacher):
                advice = "write adapter='auto'" if term.adapter is None else 'choose taps or an adapter that fit'
                raise DistillError(
                    f'student {str(term.student)!r} is {_shapes([student])} but teacher {str(term.teacher)!r} is '
                    f'{_shapes([teacher])}; {advice}.'
                )
            if term.projects:
                # Projectors make all of the teacher's classes: which are shared is known later than their size.
                theirs = None if self.classes is None else (self.classes[1], self.classes[1])
                kind = shared.read['teacher', term.teacher.module].activation
                pair = align_classes(ClassPredictions(student, kind), ClassPredictions(teacher, kind), theirs)
                values.append(self._call_loss(term, *pair, shared))
                continue
            loss = parts['losses'][level] if 'losses' in parts else term.loss
            # Also for users' own losses: half precision overflows.
            with torch.autocast(student.device.type, enabled=False):
                if getattr(loss, 'needs_target', False):
                    values.append(loss(_full(student), _full(teacher), shared.target))
                else:
                    values.append(loss(_full(student), _full(teacher)))
        return torch.stack(values).mean()


#: Losses on logits that are meant for one kind of classes.
_KINDS = {'softmax': (DISTLoss, DKDLoss, HardLabelLoss, KLDivLoss, OFALoss), 'sigmoid': (BinaryKLDivLoss,)}
_KIND_WORDS = {'softmax': 'a softmax together', 'sigmoid': 'a sigmoid each'}


_ALIGN = {DensePredictions: align, PixelPredictions: align_pixels, ClassPredictions: align_classes}


@contextmanager
def _running(side: str, model: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Names the model, where an exception of its own would only say what it stumbled over."""
    try:
        yield
    except DistillError as error:
        raise DistillError(f'{side}: {error}') from error
    except Exception as error:
        advice = 'data_preprocessor.size' if side == 'student' else 'teacher.input_size=(height, width)'
        raise CannotRunError(
            f'The {side} ({type(model).__name__}) cannot be run on an RGB image of '
            f'{"x".join(map(str, inputs.shape[-2:]))} pixels: {_in_words(error)}; if it was made for one size only, '
            f'write that as {advice}.'
        ) from error


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0][:200].rstrip(".")}'


def _refuse_frozen(term: Term, tensors: Sequence[Tensor]) -> None:
    if not any(t.requires_grad for t in tensors):
        raise DistillError(
            f'the student tap {str(term.student)!r} carries no gradient, so distilling there trains nothing; '
            'it is frozen, or inside an activation-checkpointed module: tap a trainable module, or the '
            'checkpointed module itself.'
        )


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _fit(loss: nn.Module, student: Tensor, teacher: Tensor) -> bool:
    """Whether the shapes are what a loss can compare."""
    if student.shape[:1] != teacher.shape[:1]:
        return False
    if getattr(loss, 'any_grid', False):
        return True
    start = 2 if getattr(loss, 'any_channels', False) else 1
    return student.dim() == teacher.dim() and student.shape[start:] == teacher.shape[start:]


class _Identity(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return student


_NONE = nn.ModuleDict({'adapters': nn.ModuleList()})


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """So that a check leaves the statistics of batch normalisation alone, and one image is enough for it."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _trainable(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _device(inputs: Any, model: nn.Module) -> torch.device:
    return _like(inputs, model).device


def _like(inputs: Any, model: nn.Module) -> Tensor:
    return inputs if isinstance(inputs, Tensor) else next(model.parameters())


def _shapes(tensors: Sequence[Tensor]) -> str:
    shown = ', '.join('x'.join(map(str, t.shape[1:])) for t in tensors[:5])
    return shown + (', ...' if len(tensors) > 5 else '')


def _describe(p: Predictions) -> str:
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
