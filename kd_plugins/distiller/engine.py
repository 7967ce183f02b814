"""The distiller: from what was captured in student and teacher to weighted, named losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.adapters import auto_adapter, describe_adapter
from kd_plugins.distiller.bank import AdapterBank
from kd_plugins.distiller.calling import Classes, call_loss, full
from kd_plugins.distiller.matching import FORMS, Batch, Matching, describe, shapes
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.distiller.summary import Row, count
from kd_plugins.distiller.taps import Capture, find_module
from kd_plugins.distiller.terms import Resolver, Term, build_adapter
from kd_plugins.errors import DistillError, in_words
from kd_plugins.predictions import ClassPredictions, DensePredictions, align_classes, find_reader, readable

#: ``targets(inputs, samples)``: the labels of a batch, or None when there are none.
Targets = Callable[[Any, Any], Tensor | None]


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
        self.student, self.teacher, self.terms = student, teacher, terms
        self.matching = Matching(student, teacher, classes)
        self.start, self.stop, self.alpha = start, stop, alpha
        self._targets = targets
        self.bank = bank if bank is not None else AdapterBank()
        self._resolve = resolve
        self._free: dict[str, nn.ModuleList] = {}
        self.position = Position()
        for term in terms.values():
            held = self.bank._modules.get(term.name)
            if held is not None and 'loss' in held:
                term.loss = held['loss']

    @property
    def classes(self) -> Classes:
        """``(student_index, teacher_index)`` of the classes both know, or None when the sets are equal."""
        return self.matching.classes

    @classes.setter
    def classes(self, value: Classes) -> None:
        self.matching.classes = value

    @property
    def by_class(self) -> bool:
        """Whether a term compares class by class, so that the classes of student and teacher must be matched."""
        return any(map(self.matching.by_class, self.terms.values()))

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
        with torch.no_grad():
            with _running('teacher', self.teacher.model, inputs):
                taught = self._run_teacher(inputs, samples, list(self.terms.values()))
            batch = Batch(capture, taught, self._labels(inputs, samples))
            rows = [self._check_term(term, batch, build_adapters) for term in self.terms.values()]
            if check_values:
                for term in self.terms.values():
                    self._refuse_nan(term, batch)
        return rows

    def _check_term(self, term: Term, batch: Batch, build: bool) -> Row:
        where = f'term {term.name!r}'
        try:
            whole = self.matching.reads(term)
            if not term.always_zero:
                _refuse_frozen(term, batch.student.maps(term.student))
            if whole:
                if build and not self._has_parts(term):
                    self._keep(term, nn.ModuleList())
                pair = self.matching.predictions(term, batch)
                value = call_loss(term.loss, *pair, batch.target, self.classes)
                found = tuple(map(describe, pair))
                adapter = 'none'
            else:
                pairs = self.matching.tensors(term, batch)
                if build and not self._has_parts(term):
                    self._build_adapters(term, pairs)
                with _evaluating(self._parts(term)):
                    value = self._tensor_loss(term, pairs, batch)
                found = shapes([p[0] for p in pairs]), shapes([p[1] for p in pairs])
                adapter = self._describe_adapters(term, pairs)
        except DistillError as error:
            raise DistillError(f'{where}: {error}') from error
        except Exception as error:
            taps = (batch.student, term.student), (batch.teacher, term.teacher)
            sides = [f'{tap} ({shapes(capture.maps(tap))})' for capture, tap in taps]
            raise DistillError(
                f'{where}: its adapter or {type(term.loss).__name__} fails on student {sides[0]} and teacher '
                f'{sides[1]}: {in_words(error)}; correct their options.'
            ) from error
        if value.dim() != 0:
            raise DistillError(f'{where}: {type(term.loss).__name__} must return a scalar, got {tuple(value.shape)}.')
        return Row(
            name=term.name,
            loss=type(term.loss).__name__,
            student=str(term.student),
            student_shape=found[0],
            teacher=str(term.teacher),
            teacher_shape=found[1],
            adapter=adapter,
            parameters=sum(p.numel() for p in self._parts(term).parameters()),
            weight=str(term.weight),
        )

    def _refuse_nan(self, term: Term, batch: Batch) -> None:
        tensors = batch.teacher.maps(term.teacher)
        if self.matching.form(term) is DensePredictions:
            # Large raw outputs are finite, but the boxes decoded from them may not be.
            _, decoded = self.matching.predictions(term, batch)
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
            labels = self._labels(inputs, samples) if any(map(self._needs_labels, live)) else None
            batch = Batch(capture, taught, labels)
            for term in live:
                if term.temperature is not None:
                    term.loss.temperature = term.temperature(self.position.progress)
                try:
                    value = self._term_loss(term, batch)
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
        return self.teacher.outputs(inputs, samples, [t.teacher.module for t in terms])

    def _needs_labels(self, term: Term) -> bool:
        # Images of a class that the teacher does not know are left out.
        partly = self.classes is not None and (term.projects or self.matching.form(term) is ClassPredictions)
        return partly or getattr(term.loss, 'needs_target', False)

    def _labels(self, inputs: Any, samples: Any) -> Tensor | None:
        return self._targets(inputs, samples) if self._targets is not None else None

    def _term_loss(self, term: Term, batch: Batch) -> Tensor:
        if self.matching.reads(term):
            student, teacher = self.matching.predictions(term, batch)
            source = student.cls if isinstance(student, DensePredictions) else student.logits
            value = call_loss(term.loss, student, teacher, batch.target, self.classes)
        else:
            pairs = self.matching.tensors(term, batch)
            source = pairs[0][0]
            value = self._tensor_loss(term, pairs, batch)
        if torch.is_grad_enabled():
            # Again: other than in the dry run, the model trains now, and may have been frozen since.
            _refuse_frozen(term, [source])
        return value

    def _tensor_loss(self, term: Term, pairs: list[tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
        parts = self._parts(term)
        adapters = parts['adapters']
        values = []
        for level, (student, teacher) in enumerate(pairs):
            if len(adapters):
                adapter = adapters[level]
                sized = getattr(adapter, 'needs_image_size', False)
                more = {'image_size': batch.student.image_size} if sized else {}
                student = adapter(student, teacher, **more)
            if term.consumes == 'features' and student.dim() == teacher.dim() == 3:
                # Channels second, as in maps.
                student, teacher = student.transpose(1, 2), teacher.transpose(1, 2)
            if not _fit(term.loss, student, teacher):
                advice = "write adapter='auto'" if term.adapter is None else 'choose taps or an adapter that fit'
                raise DistillError(
                    f'student {str(term.student)!r} is {shapes([student])} but teacher {str(term.teacher)!r} is '
                    f'{shapes([teacher])}; {advice}.'
                )
            if term.projects:
                # Projectors make all of the teacher's classes: which are shared is known later than their size.
                theirs = None if self.classes is None else (self.classes[1], self.classes[1])
                kind = batch.read['teacher', term.teacher.module].activation
                pair = align_classes(ClassPredictions(student, kind), ClassPredictions(teacher, kind), theirs)
                values.append(call_loss(term.loss, *pair, batch.target, self.classes))
                continue
            loss = parts['losses'][level] if 'losses' in parts else term.loss
            # Also for users' own losses: half precision overflows.
            with torch.autocast(student.device.type, enabled=False):
                if getattr(loss, 'needs_target', False):
                    values.append(loss(full(student), full(teacher), batch.target))
                else:
                    values.append(loss(full(student), full(teacher)))
        return torch.stack(values).mean()


@contextmanager
def _running(side: str, model: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Names the model, where an exception of its own would only say what it stumbled over."""
    try:
        yield
    except DistillError as error:
        raise DistillError(f'{side}: {error}') from error
    except Exception as error:
        # Classifiers are run at the size that their config names.
        own = 'model.input_size' if hasattr(model, 'logits') else 'data_preprocessor.size'
        advice = own if side == 'student' else 'teacher.input_size=(height, width)'
        raise CannotRunError(
            f'The {side} ({type(model).__name__}) cannot be run on an RGB image of '
            f'{"x".join(map(str, inputs.shape[-2:]))} pixels: {in_words(error)}; if it was made for one size only, '
            f'write that as {advice}.'
        ) from error


def _refuse_frozen(term: Term, tensors: Sequence[Tensor]) -> None:
    if not any(t.requires_grad for t in tensors):
        raise DistillError(
            f'the student tap {str(term.student)!r} carries no gradient, so distilling there trains nothing; '
            'it is frozen, or inside an activation-checkpointed module: tap a trainable module, or the '
            'checkpointed module itself.'
        )


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
