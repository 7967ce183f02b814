"""The engine: from what was captured in student and teachers to weighted, named losses. Knows no framework."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_plugins.distiller.apart import Apart
from kd_plugins.distiller.balance import AIM, Balance
from kd_plugins.distiller.bank import AdapterBank
from kd_plugins.distiller.combining import Compared
from kd_plugins.distiller.history import History
from kd_plugins.distiller.host import Host
from kd_plugins.distiller.matching import Batch, Matching, refuse_layers_of_logits, shapes
from kd_plugins.distiller.optimizer import AdapterOptimizer, Clip
from kd_plugins.distiller.parts import Parts, trainable
from kd_plugins.distiller.protocol import Detector, Teacher
from kd_plugins.distiller.schedules import Constant, Position, Window, ended
from kd_plugins.distiller.stages import Freezer, Stage, check_stages, parameters_of, rest_of
from kd_plugins.distiller.stopwatch import Stopwatch
from kd_plugins.distiller.summary import Row, schedule_text
from kd_plugins.distiller.taps import ALL, Capture, Tap, find_module, image_size_of
from kd_plugins.distiller.temperature import LearnedTemperature, Observing
from kd_plugins.distiller.terms import Resolver, Term
from kd_plugins.errors import DistillError, in_words, nearest
from kd_plugins.losses._common import as_full
from kd_plugins.losses.base import DistillLoss, Extras, declaration_of
from kd_plugins.predictions import Classes, ClassPredictions, DensePredictions, Form, align_classes, forms, readable

#: Iterations in which KD should have been computed and was not, after which a run is stopped.
PATIENCE = 2

#: Losses below are those of equal models: fusing the teacher's normalisation rounds differently.
EQUAL = 1e-6


class CannotRunError(DistillError):
    """A model does not take the images of the start-up check; another size may do."""


class Session(Apart):
    """One distilled run.

    A host builds it, calls :meth:`check` once, and then in every training iteration :meth:`begin_iteration`, an open
    :meth:`capture` around the student's forward pass, and :meth:`losses`.

    Args:
        student: The plain student model (unwrapped).
        teachers: The teachers by name, or the only one.
        terms: Terms by name.
        host: The framework. Default: a plain training loop.
        classes: For each teacher by name ``(student_index, teacher_index)`` of the classes both know, None where the
            sets are equal; or that of the only one.
        window: In which epochs (iterations in an iteration-based run) KD is on.
        alpha: Balance of the run: ``alpha`` times the KD losses and ``1 - alpha`` times the student's own, while KD is
            on. None: both as they are.
        resolve: Finds adapters that are not ours.
        pseudo: Which detections of the teachers the host adds to the labels, see :meth:`pseudo_labels`; None: none.
        stages: Parts of the run, one after the other, with terms, frozen parts and a balance of their own.

    Attributes:
        bank: The trainable adapters, in no module tree; empty for parameter-free terms.
        optimizer: That of the adapters, between :meth:`attach` and :meth:`detach`.
        follows: The student's optimizer, between the same.
        position: Where in the run the next iteration is; set by the host.
        history: What was logged so far.
        stopwatch: How long teachers take.
        notes: What the check found worth saying.

    Raises:
        DistillError: A term names a teacher or a place that does not exist.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, Teacher] | Teacher,
        terms: dict[str, Term],
        host: Host | None = None,
        *,
        classes: Mapping[str, Classes] | Classes = None,
        window: Window | None = None,
        alpha: float | None = None,
        resolve: Resolver | None = None,
        pseudo: Detector | None = None,
        stages: Sequence[Stage] = (),
    ) -> None:
        self.student, self.terms = student, terms
        self.host = Host() if host is None else host
        self.teachers: dict[str, Teacher] = dict(teachers) if isinstance(teachers, Mapping) else {'': teachers}
        self.window, self._alpha, self.pseudo = Window() if window is None else window, alpha, pseudo
        self.stages, self.freezer = tuple(stages), Freezer(student)
        self.position = Position()
        self.balance = Balance()
        self.stopwatch = Stopwatch()
        self.history = History()
        self.bank = AdapterBank()
        self.parts = Parts(self.bank, resolve)
        self.notes: list[str] = []
        self.optimizer: AdapterOptimizer | None = None
        self.follows: Optimizer | None = None
        self._handles: list[Any] = []
        self._captures: dict[tuple[str, ...], Capture] = {}
        self._taught: dict[str, Capture] | None = None
        self._asked, self._missed, self._checked, self._began = 0, 0, False, False
        self._stage: int | None = None
        for term in terms.values():
            try:
                self._find_places(term)
            except DistillError as error:
                raise DistillError(f'term {term.name!r}: {error}') from error
        self.matching = Matching(student, self.teachers, {}, self.host.head(student))
        self.set_classes(classes)
        check_stages(self.stages, self.terms)
        self._frozen = [self._find_frozen(i, stage) for i, stage in enumerate(self.stages)]
        self._frozen_by = {n: self._modules_of(t.freeze, f'term {n!r}: freeze') for n, t in terms.items() if t.freeze}

    def _find_places(self, term: Term) -> None:
        """Find the teachers and the modules that a term names."""
        term.student = self.host.tap(self.student, term.student)
        taps = [replace(t, owner=name) for t in term.taps for name in (self.teachers if t.owner == ALL else [t.owner])]
        term.teacher, *others = map(self._find_in_teacher, taps)
        term.others = tuple(others)
        if not others:
            term.combine = None

    def _find_in_teacher(self, tap: Tap) -> Tap:
        owner = tap.owner
        if not owner and len(self.teachers) == 1:
            owner = next(iter(self.teachers))
        if owner not in self.teachers:
            if not owner:
                names = ', '.join(repr(f'{name}:{tap}') for name in self.teachers)
                raise DistillError(f'there are several teachers; say which one: teacher={names}.')
            raise DistillError(f'there is no teacher {owner!r}: {nearest(owner, [n for n in self.teachers if n])}')
        return replace(self.teachers[owner].tap(tap), owner=owner)

    def _find_frozen(self, index: int, stage: Stage) -> list[nn.Module]:
        """What does not train in a stage."""
        where = f'stages[{index}]: {"train" if stage.train else "freeze"}'
        found = self._modules_of(stage.train or stage.freeze, where)
        return rest_of(self.student, found) if stage.train else found

    def _modules_of(self, names: Sequence[str], where: str) -> list[nn.Module]:
        found = []
        for name in names:
            try:
                found += self.host.part(self.student, name)
            except DistillError as error:
                raise DistillError(f'{where}: {error}') from error
        return found

    def _refuse_unreachable(self, capture: Capture) -> None:
        """Refuse that all is frozen that a term would teach; on outputs whose graph is there.

        Raises:
            DistillError: A term teaches nothing in a stage.
        """
        for i in range(max(len(self.stages), 1)):
            stage = self.stages[i] if self.stages else Stage()
            for term in self.terms.values():
                frozen = [*(self._frozen[i] if self.stages else ()), *self._frozen_by.get(term.name, ())]
                if not frozen or term.always_zero or (stage.terms is not None and term.name not in stage.terms):
                    continue
                still = {id(p) for p in parameters_of(frozen)}
                left = [p for p in self.student.parameters() if p.requires_grad and id(p) not in still]
                outputs = [t.float().sum() for t in capture.maps(term.student) if t.requires_grad]
                reached = outputs and left and torch.autograd.grad(outputs, left, allow_unused=True, retain_graph=True)
                if not any(g is not None for g in reached or ()):
                    where = f'in stages[{i}]' if self.stages else 'with what it freezes'
                    raise DistillError(
                        f'term {term.name!r} teaches nothing {where}: all is frozen that leads to the student tap '
                        f'{str(term.student)!r}; leave a part of it to train, or take the term out of there.'
                    )

    @property
    def teacher(self) -> Teacher:
        """The only teacher.

        Raises:
            DistillError: There are several.
        """
        if len(self.teachers) != 1:
            raise DistillError(f'There are {len(self.teachers)} teachers: {", ".join(self.teachers)}.')
        return next(iter(self.teachers.values()))

    @property
    def classes(self) -> dict[str, Classes]:
        """``(student_index, teacher_index)`` of the classes shared with each teacher, None when the sets are equal."""
        return dict(self.matching.classes)

    def set_classes(self, classes: Mapping[str, Classes] | Classes) -> None:
        """Say which classes correspond, see `Session`."""
        found = classes if isinstance(classes, Mapping) else dict.fromkeys(self.teachers, classes)
        self.matching.classes = {name: found.get(name) for name in self.teachers}

    def by_class(self, teacher: str) -> bool:
        """Whether a term compares class by class with this teacher, so that their classes must be matched."""
        return any(self.matching.by_class(t) for t in self._of(teacher))

    @property
    def student_modules(self) -> list[str]:
        """Paths that are tapped in the student."""
        return list(dict.fromkeys(path for t in self.terms.values() for path in t.student.modules))

    def capture(self, known: Sequence[str] = ()) -> Capture:
        """The capture of the student's taps; opened around its forward pass, which forgets the one before.

        Args:
            known: Paths whose output the host puts into it itself, see `Capture.put`.
        """
        modules = self._modules([t.student for t in self.live])
        paths = tuple(m for m in modules if m not in known)
        if paths not in self._captures:
            self._captures[paths] = Capture(self.student, paths, 'student')
        return self._captures[paths]

    # ------------------------------------------------------------------ where in the run
    @property
    def active(self) -> bool:
        """Whether KD is on at the current position: inside its window, with a weight above 0."""
        return bool(self.live)

    @property
    def _freezes(self) -> bool:
        return any(self._frozen) or bool(self._frozen_by)

    @property
    def stage(self) -> int | None:
        """The stage at the current position, counted from 0; None in a run without."""
        now = self.position.unit
        ends = [stage.ends(self.position) for stage in self.stages]
        return next((i for i, end in enumerate(ends) if end is None or now < end), None)

    @property
    def alpha(self) -> float | None:
        """The balance at the current position, see `Session`."""
        stage = self.stage
        own = None if stage is None else self.stages[stage].alpha
        return self._alpha if own is None else own

    @alpha.setter
    def alpha(self, value: float | None) -> None:
        self._alpha = value

    @property
    def _alphas(self) -> set[float | None]:
        """The balances of all parts of the run."""
        return {self._alpha if stage.alpha is None else stage.alpha for stage in self.stages} or {self._alpha}

    def schedule(self, unit: str, total: int) -> str:
        """When KD is on, in words; ``total`` is the length of the run in units."""
        return schedule_text(self.window, unit, total, self._alpha, self.stages)

    @property
    def live(self) -> list[Term]:
        """The terms that are on at the current position."""
        now, stage = self.position.unit, self.stage
        if not self.window(now) or self.alpha == 0:
            return []
        names = None if stage is None else self.stages[stage].terms
        found = [t for t in self.terms.values() if names is None or t.name in names]
        return [t for t in found if t.window(now) and self.weight(t) > 0]

    def teaches(self, module: str) -> bool:
        """Whether a student module is tapped by a term that is on at the current position."""
        return any(module in t.student.modules for t in self.live)

    def weight(self, term: Term) -> float:
        """A term's weight at the current position."""
        return term.weight(self.position)

    def _found_weight(self, term: Term) -> float:
        return self.weight(term) * (1.0 if term.ratio is None else term.ratio.current)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term at the current position, 0 while it is off."""
        on = {t.name for t in self.live}
        return {name: self._found_weight(t) if name in on else 0.0 for name, t in self.terms.items()}

    @property
    def temperatures(self) -> dict[str, float]:
        """The temperature at the current position, of the terms that have a schedule of it."""
        scheduled = {name: t.temperature for name, t in self.terms.items() if t.temperature is not None}
        return {name: float(schedule(self.position)) for name, schedule in scheduled.items()}

    @property
    def _observing(self) -> dict[str, Observing]:
        found: dict[str, Observing] = {}
        for name, term in self.terms.items():
            temperature: Any = term.temperature
            if isinstance(temperature, Observing):
                found[name] = temperature
        return found

    def close_row(self, unit: str, at: int) -> None:
        """An epoch (an interval of the log) is over, see `History.close`."""
        self.history.close(unit, at, self.weights, self.temperatures)

    def begin_run(self, position: Position, total: int | None = None) -> None:
        """The run begins at a position, or goes on there.

        Args:
            position: Of its first iteration.
            total: Where it ends, in the units of windows; None: not known yet.

        Raises:
            DistillError: A window is behind the end of the run, or a schedule counts what the run does not.
        """
        self.position = position
        unit = 'iteration' if position.epoch is None else 'epoch'
        windows = {'': self.window, **{f'term {name!r}: ': t.window for name, t in self.terms.items()}}
        for where, window in windows.items():
            end = min((x for x in (total, self.window.stop) if x is not None), default=None)
            if end is not None and window.start >= end:
                what = 'the end of the run' if end == total else 'stop, the end of the distillation'
                raise DistillError(
                    f'{where}start={window.start} is not before {what} ({end} {unit}s): KD would never run.'
                )
        for i, stage in enumerate(self.stages):
            begins = stage.ends(position)
            if begins is not None and total is not None and begins >= total:
                raise DistillError(
                    f'stages[{i}].until={stage.until} is not before the end of the run ({total} {unit}s), so the next '
                    'stage would never begin; write a fraction of the run, e.g. until=0.5, or leave it out.'
                )
        for term in self.terms.values():
            try:
                self.weight(term)
                if term.temperature is not None:
                    term.temperature(position)
            except DistillError as error:
                raise DistillError(f'term {term.name!r}: {error}') from error
            if term.ratio is not None and 1 in self._alphas:
                raise DistillError(
                    f"term {term.name!r}: weight='auto' holds KD at a share of the student's own loss, which alpha=1 "
                    'leaves out; write a number, or another alpha.'
                )

    def over(self, term: Term) -> bool:
        """Whether a term will not be on again."""
        stops = [w.stop for w in (self.window, term.window) if w.stop is not None]
        if any(self.position.unit >= stop for stop in stops):
            return True
        stage = self.stage
        coming = [] if stage is None else self.stages[stage:]
        if coming and all(s.terms is not None and term.name not in s.terms for s in coming):
            return True
        # A weight of 0 throughout is a plain run that somebody compares with, and ends when that does.
        return not term.always_zero and ended(term.weight, self.position)

    def _release(self) -> str | None:
        """Let go of the teachers that no term will ask again, and of their memory."""
        released = [n for n in self.teachers if all(map(self.over, self._of(n)))]
        if not released:
            return None
        self._taught = None
        for name in released:
            del self.teachers[name]
        # What hangs on modules refers to them, so counting references does not free them.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        left = f'; {len(self.teachers)} of the teachers go on' if self.teachers else ''
        return f'Distillation is over: no term is on from here, and the teacher was released{left}.'

    def begin_iteration(self, position: Position) -> str | None:
        """A training iteration begins; the one before must have asked for :meth:`losses` if KD was on.

        Returns:
            A sentence for the log when a stage begins, or teachers were released, because their last window is over.

        Raises:
            DistillError: KD was on in several iterations, and the losses were never asked for.
        """
        if self._missed >= PATIENCE and not self._asked:
            raise DistillError(
                f'distillation was on for {self._missed} iterations, but {self.host.missed(self.student)}; nothing '
                'was distilled.'
            )
        # One that is done again, with less memory, has not been missed.
        self._missed = 0 if position.iteration <= self.position.iteration else self._missed
        for temperature in self._observing.values():
            temperature.begin(position)
        begins = position.unit != self.position.unit or not self._began
        self.position, self._began = position, True
        self._missed += self.active
        stage = self.stage
        if self._freezes:
            parts = [m for t in self.live for m in self._frozen_by.get(t.name, ())]
            self.freezer.freeze([*(self._frozen[stage] if stage is not None else ()), *parts])
            self.freezer.begin_iteration()
        said = self._release() if begins else None
        changed, self._stage = stage != self._stage, stage
        if not changed or stage is None:
            return said
        return ' '.join(filter(None, [f'Stage {stage + 1} of {len(self.stages)}: {self.stages[stage]}.', said]))

    @property
    def asked(self) -> int:
        """Iterations in which the KD losses were computed so far."""
        return self._asked

    def finish(self) -> str | None:
        """The run is over: a sentence when nothing was ever distilled, for the log."""
        if self._asked or all(t.always_zero for t in self.terms.values()):
            return None
        reason = f': {self.host.missed(self.student)}' if self._missed else ''
        return f'This run was not distilled: KD ({self.window}) was never computed{reason}.'

    # ------------------------------------------------------------------ before the first iteration
    def check_heads(self) -> None:
        """Refuse terms on whole heads that cannot be read.

        Raises:
            DistillError: A head has no reader for what the term's loss compares.
        """
        for term in self.terms.values():
            try:
                self.matching.form(term)
            except DistillError as error:
                raise DistillError(f'term {term.name!r}: {error}') from error
        for name, teacher in self.teachers.items():
            asked = [(tap, self.matching.form(t)) for t in self._of(name) for tap in t.taps]
            teacher.expect([(tap, form) for tap, form in asked if tap.owner == name])

    def check(self, inputs: Tensor, samples: Any = None) -> list[Row]:
        """Run all models once without gradients, build the adapters and check that every term fits.

        Neither weights, buffers, modes nor random generators of the models change.

        Args:
            inputs: ``(B, C, H, W)`` a batch as the student is given it.
            samples: What the framework hands on with it, or None.

        Returns:
            One row per term for the summary table.

        Raises:
            DistillError: A tap does not run or shapes do not fit.
        """
        # Before anything runs: some of these models cannot even be run without annotations.
        self.check_heads()
        around = {side: self._heads_around(side) for side in ('student', *self.teachers)}
        modes = [(m, m.training) for m in self.student.modules()]
        capture = Capture(self.student, [*self.student_modules, *around['student']], 'student')
        try:
            self.student.eval()
            for module in capture.modules.values():
                if any(readable(module, f) for f in forms() if f.trains_alone):
                    # Only the head's own flag: it returns its training form while BN statistics stay.
                    module.training = True
            # With gradients, to see which taps have one.
            with torch.enable_grad(), capture, self._running('student', self.student, inputs):
                capture.image_size = image_size_of(inputs)
                self.host.run(self.student, inputs, samples, tuple(capture.modules))
            if any(self._frozen) or self._frozen_by:
                self._refuse_unreachable(capture)
        finally:
            for module, training in modes:
                module.training = training
        with torch.no_grad():
            taught = {}
            for name, teacher in self.teachers.items():
                with self._running('teacher', teacher.model, inputs):
                    paths = [*self._modules(self._taps_in(name)), *around[name]]
                    taught[name] = self._ask(name, inputs, samples, paths)
            batch = Batch(capture, taught, self.host.targets(inputs, samples))
            self._count_images()
            heads = {side: self._read_heads(side, around[side], batch) for side in around}
            rows = [self._check_term(term, batch, heads) for term in self.terms.values()]
            for term in self.terms.values():
                self._refuse_nan(term, batch)
            if self.pseudo is not None:
                self._check_pseudo(batch)
        self.notes += batch.notes.values()
        self.notes += self._notes_on(batch, rows)
        self._checked = True
        return rows

    def _count_images(self) -> None:
        """Tell losses that balance classes how many training images each has that is compared.

        Raises:
            DistillError: Nobody knows.
        """
        asked = [t for t in self.terms.values() if t.declared.balances]
        found: Sequence[int] | None = None
        for term in asked:
            loss = cast(Extras, term.loss)
            if loss.counts is None:
                if found is None:
                    found = None if self.host.counts is None else self.host.counts()
                if found is None:
                    raise DistillError(
                        f'term {term.name!r}: {type(term.loss).__name__} balances classes by their number of training '
                        'images, which this data set does not tell; write them in the order of the classes: '
                        f"loss=dict(type='{type(term.loss).__name__}', counts=[500, 20, ...])."
                    )
                loss.counts = found
            classes = self.matching.classes_of(term)
            if classes is not None and len(loss.counts) > max(classes[0]):
                loss.counts = [loss.counts[i] for i in classes[0]]
            term.declared = replace(term.declared, balances=False)

    def _check_pseudo(self, batch: Batch) -> None:
        """Refuse pseudo-labels where teachers detect nothing, or where boxes are not all that labels teach."""
        named = self._detectors(self.terms.values())
        for name in self.teachers:
            if name not in named:
                raise DistillError(
                    'pseudo_labels needs what the teacher detects, and no term compares whole heads of detectors; add '
                    "one, e.g. cls=dict(loss=dict(type='BinaryKLDivLoss'), student='head', teacher='head')."
                )
            found = self._detections(name, named[name], batch)
            if sum(map(len, found)) and batch.student.image_size is None:
                raise DistillError('pseudo_labels needs batches of images (B, C, H, W).')
        for term in self.terms.values():
            if self.matching.form(term) is DensePredictions:
                ours = self.matching.read('student', batch.student, term.student, DensePredictions, batch)
                assert isinstance(ours, DensePredictions)
                more = [*ours.besides, *(['masks'] if ours.coefficients is not None else [])]
                if more:
                    raise DistillError(
                        f'pseudo_labels adds boxes, but the labels of this student also hold {" and ".join(more)}, '
                        'which a detection does not give; remove pseudo_labels.'
                    )
        self.notes.append(f'{self.pseudo}')

    def _detectors(self, terms: Iterable[Term]) -> dict[str, Tap]:
        """Where each teacher's detections are read: the taps of terms on whole detection heads."""
        found: dict[str, Tap] = {}
        for term in terms:
            if self.matching.form(term) is DensePredictions:
                for tap in term.taps:
                    found.setdefault(tap.owner, tap)
        return found

    def _detections(self, name: str, tap: Tap, batch: Batch) -> list[Tensor]:
        predictions = self.matching.read('teacher', batch.teachers[name], tap, DensePredictions, batch)
        assert isinstance(predictions, DensePredictions) and self.pseudo is not None
        size = batch.teachers[name].image_size
        assert size is not None
        return self.pseudo.detect(predictions, self.matching.classes.get(name), (int(size[0]), int(size[1])))

    def _notes_on(self, batch: Batch, rows: Sequence[Row]) -> list[str]:
        notes = []
        if all(t.always_zero for t in self.terms.values()):
            notes.append('all weights are 0: the run is the plain one')
        elif all(abs(row.value) < EQUAL for row in rows):
            notes.append('student and teacher are equal so far: only what the labels change will be held back')
        ours = [found for (side, *_), found in batch.read.items() if side == 'student']
        besides = {words for found in ours for words in found.besides} - {found.name for found in ours}
        if besides:
            notes.append(f'not taught: {", ".join(sorted(besides))}')
        return notes

    def _of(self, teacher: str) -> list[Term]:
        return [t for t in self.terms.values() if any(tap.owner == teacher for tap in t.taps)]

    def _taps_in(self, teacher: str) -> list[Tap]:
        return [tap for t in self.terms.values() for tap in t.taps if tap.owner == teacher]

    @staticmethod
    def _modules(taps: Sequence[Tap]) -> list[str]:
        return list(dict.fromkeys(path for tap in taps for path in tap.modules))

    def _heads_around(self, side: str) -> list[str]:
        """Readable heads in which a tapped layer lies: the layer may be what makes their class logits."""
        model = self.student if side == 'student' else self.teachers[side].model
        taps = [t.student for t in self.terms.values()] if side == 'student' else self._taps_in(side)
        found = []
        for tap in taps:
            parts = tap.module.split('.')
            for end in range(1, len(parts)):
                path = '.'.join(parts[:end])
                module = find_module(model, path, side)
                if any(readable(module, f) for f in forms() if f.has_class_logits):
                    found.append(path)
        return list(dict.fromkeys(found))

    def _read_heads(self, side: str, paths: Sequence[str], batch: Batch) -> list[tuple[str, Form]]:
        capture = batch.student if side == 'student' else batch.teachers[side]
        found: list[tuple[str, Form]] = []
        for path in paths:
            form = next(f for f in forms() if f.has_class_logits and readable(capture.modules[path], f))
            try:
                found.append((path, self.matching.read(capture.where, capture, Tap(path), form, batch)))
            except DistillError:
                # Whatever cannot be read for a term of its own is refused there.
                continue
        return found

    def _check_term(self, term: Term, batch: Batch, heads: Mapping[str, Sequence[tuple[str, Form]]]) -> Row:
        where = f'term {term.name!r}'
        taught, device = batch.teachers[term.teacher.owner], next(self.student.parameters()).device
        try:
            whole = self.matching.reads(term)
            if isinstance(term.temperature, Observing) and not (whole or term.projects):
                raise DistillError(
                    'its temperature depends on what is predicted, and the term compares tensors; write a number or a '
                    'schedule, or tap whole heads.'
                )
            if term.samples is not None and not (whole or term.projects):
                raise DistillError(
                    f'samples weighs images by what is predicted for them, and {type(term.loss).__name__} compares '
                    'tensors here; remove it, or tap whole heads with a loss on predictions or logits.'
                )
            if not term.always_zero:
                _refuse_frozen(term, batch.student.maps(term.student))
                _refuse_too_few(term, len(batch.student.maps(term.student)[0]))
            if whole:
                if term not in self.parts:
                    self.parts.keep(term, device)
                compared = self._compared(term, batch)
                pair = compared[0].student, compared[0].teacher
                if term.declared.stands_for_another:
                    term.loss = cast(Extras, term.loss).for_predictions(*pair)
                    term.declared = declaration_of(term.loss)
                if isinstance(term.temperature, Observing):
                    if len(compared) > 1:
                        raise DistillError(
                            'its temperature follows one teacher, and several teach here, each by itself; write a '
                            "number or a schedule, or combine='mean'."
                        )
                    term.temperature.check(pair[0])
                value = self._compare_all(term, compared, batch)
                if isinstance(term.temperature, LearnedTemperature):
                    _refuse_constant(term, term.temperature, lambda: self._compare_all(term, compared, batch))
                found = pair[0].describe(), pair[1].describe()
                adapter = 'none'
            else:
                if term.combine is not None:
                    raise DistillError(
                        f'several teachers are combined by what they predict, and {type(term.loss).__name__} compares '
                        'tensors here; tap whole heads, or write one term for each of them.'
                    )
                pairs = self.matching.tensors(term, batch)
                owners = {'student': heads['student'], 'teacher': heads[term.teacher.owner]}
                refuse_layers_of_logits(term, batch, owners)
                if term not in self.parts:
                    self.parts.build(term, pairs, batch, device)
                with _evaluating(self.parts.of(term)):
                    value = self._tensor_loss(term, pairs, batch)
                    if isinstance(term.temperature, LearnedTemperature):
                        _refuse_constant(term, term.temperature, lambda: self._tensor_loss(term, pairs, batch))
                found = shapes([p[0] for p in pairs]), shapes([p[1] for p in pairs])
                adapter = self.parts.describe(term, pairs, batch)
        except DistillError as error:
            raise DistillError(f'{where}: {error}') from error
        except Exception as error:
            sides = [
                f'{tap} ({shapes(c.maps(tap))})' for c, tap in ((batch.student, term.student), (taught, term.teacher))
            ]
            raise DistillError(
                f'{where}: its adapter or {type(term.loss).__name__} fails on student {sides[0]} and teacher '
                f'{sides[1]}: {in_words(error)}; correct their options.'
            ) from error
        if value.dim() != 0:
            raise DistillError(f'{where}: {type(term.loss).__name__} must return a scalar, got {tuple(value.shape)}.')
        return Row(
            name=term.name,
            loss=type(term.loss).__name__ + ('' if term.temperature is None else f', temperature {term.temperature}'),
            student=str(term.student),
            student_shape=found[0],
            teacher=term.teacher_text,
            teacher_shape=found[1],
            adapter=adapter,
            parameters=sum(p.numel() for p in self.parts.of(term).parameters()),
            weight=term.weight_text,
            when='' if term.window == Window() else str(term.window),
            value=float(value),
        )

    def _refuse_nan(self, term: Term, batch: Batch) -> None:
        for one in term.each:
            self._refuse_nan_of(one, batch)

    def _refuse_nan_of(self, term: Term, batch: Batch) -> None:
        tensors = batch.teachers[term.teacher.owner].maps(term.teacher)
        if self.matching.form(term) is not None:
            # Large raw outputs are finite, but the boxes decoded from them may not be.
            tensors = [*tensors, *self.matching.predictions(term, batch)[1].tensors()]
        for tensor in tensors:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DistillError(
                    f'term {term.name!r}: the teacher returns NaN or infinite values at {str(term.teacher)!r}; '
                    'its checkpoint is damaged, or its normalisation or precision is wrong.'
                )

    # ------------------------------------------------------------------ every iteration
    @torch.no_grad()
    def pseudo_labels(self, inputs: Tensor, samples: Any) -> list[Tensor] | None:
        """What the teachers detect on a batch, for the host to add where it has no label; before the student's loss.

        The teachers run now, and what they computed serves :meth:`losses` on the same batch.

        Args:
            inputs: ``(B, C, H, W)`` the batch that the student sees.
            samples: What the framework hands on with it.

        Returns:
            Per image ``(n, 6)``, see `Detector.detect`; None while there is nothing to add: without the option,
            outside of the window, or while the terms on detection heads are off.
        """
        self._taught = None
        named = self._detectors(self.live) if self.pseudo is not None else {}
        if not named:
            return None
        self._taught = self._teach([t for t in self.live if self.host.factor(t.student)], inputs, samples)
        batch = Batch(Capture(self.student, (), 'student'), self._taught)
        found = [self._detections(name, tap, batch) for name, tap in named.items() if name in self._taught]
        return [torch.cat(rows) for rows in zip(*found, strict=True)] if found else None

    def losses(self, capture: Capture, inputs: Any, samples: Any, task: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted KD losses of one iteration.

        Args:
            capture: The closed capture of the student's forward pass.
            inputs: The batch the student saw.
            samples: What the framework hands on with it.
            task: The student's own loss, a scalar in the scale of the KD losses; only weights that are held at a share
                of it need it.

        Returns:
            ``loss_kd_<name>`` for every term (a constant 0 while the term is off), with gradients to the student.

        Raises:
            DistillError: A tap did not run, carries no gradient, or the teacher returned NaN.
        """
        device = _like(inputs, self.student).device
        live = [t for t in self.live if self.host.factor(t.student)]
        on = {t.name for t in live}
        # Only for those that are off: each is a launch on a GPU.
        result = {f'loss_kd_{name}': torch.zeros((), device=device) for name in self.terms if name not in on}
        self.bank.mark(term.name for term in live)
        if not live:
            return result
        self._asked += 1
        capture.image_size = image_size_of(inputs)
        taught, self._taught = self._taught, None
        if taught is None:
            taught = self._teach(live, inputs, samples)
        labels = self.host.targets(inputs, samples) if any(map(self._needs_labels, live)) else None
        batch = Batch(capture, taught, labels)
        for term in live:
            if term.temperature is not None:
                cast(Extras, term.loss).temperature = term.temperature(self.position)
            try:
                value = self._term_loss(term, batch)
            except DistillError as error:
                raise DistillError(f'term {term.name!r}: {error}') from error
            balance = 1.0 if self.alpha is None else self.alpha
            share = balance * self.host.factor(term.student)
            weight = self.weight(term) if term.ratio is None else self._find_weight(term, value * share, task)
            result[f'loss_kd_{term.name}'] = value * (weight * share)
        return {key: result[key] for key in (f'loss_kd_{name}' for name in self.terms)}

    @property
    def needs_task(self) -> bool:
        """Whether :meth:`losses` needs the student's own loss."""
        return any(t.ratio is not None for t in self.terms.values())

    def _find_weight(self, term: Term, value: Tensor, task: Tensor | None) -> Tensor:
        assert term.ratio is not None
        if task is None:
            raise DistillError(
                f"term {term.name!r}: weight='auto' holds KD at a share of the student's own loss; give that to "
                'session.losses(..., task=loss).'
            )
        own = 1.0 if self.alpha is None else 1 - self.alpha
        return term.ratio.weight(task * own, value) * self.weight(term)

    def _teach(self, live: Sequence[Term], inputs: Any, samples: Any) -> dict[str, Capture]:
        """Run every teacher that a term needs."""
        taps: dict[str, list[Tap]] = {}
        for term in live:
            for tap in term.taps:
                taps.setdefault(tap.owner, []).append(tap)
        return {n: self._ask(n, inputs, samples, self._modules(t)) for n, t in taps.items()}

    def _ask(self, name: str, inputs: Any, samples: Any, modules: Sequence[str]) -> Capture:
        teacher = self.teachers[name]
        seen = self.host.for_teacher(inputs)
        like = _like(seen, self.student)
        teacher.to(like)
        if not self._checked:
            return teacher.outputs(seen, samples, modules)
        with self.stopwatch.measure(name, like.device.type):
            return teacher.outputs(seen, samples, modules)

    def _needs_labels(self, term: Term) -> bool:
        form = ClassPredictions if term.projects else self.matching.form(term)
        partly = form is not None and any(form.needs_labels(self.matching.classes_of(one)) for one in term.each)
        labels = isinstance(term.temperature, Observing) or any(
            getattr(part, 'needs_target', False) for part in (term.samples, term.combine)
        )
        return partly or term.declared.needs_target or labels

    def _term_loss(self, term: Term, batch: Batch) -> Tensor:
        if self.matching.reads(term):
            compared = self._compared(term, batch)
            found = compared[0].student.tensors()
            value = self._compare_all(term, compared, batch)
        else:
            pairs = self.matching.tensors(term, batch)
            found = [ours for ours, _ in pairs]
            value = self._tensor_loss(term, pairs, batch)
        if torch.is_grad_enabled():
            # Again: other than in the dry run, the model trains now, and may have been frozen since.
            # A part of it may be cut off: a layer that is frozen, the prototypes of YOLO26's one-to-one branch.
            _refuse_frozen(term, found)
        return value

    def _compared(self, term: Term, batch: Batch) -> Sequence[Compared]:
        """What a term on whole predictions compares: one pair, or what its teachers together make."""
        each = [Compared(*self.matching.predictions(t, batch), self.matching.classes_of(t)) for t in term.each]
        if term.combine is None:
            return each
        with torch.autocast(each[0].student.source.device.type, enabled=False):
            return term.combine(each, batch.target)

    def _compare_all(self, term: Term, compared: Sequence[Compared], batch: Batch) -> Tensor:
        values = [self._compare(term, one, batch) for one in compared]
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def _compare(self, term: Term, compared: Compared, batch: Batch) -> Tensor:
        """The loss of two aligned predictions; where images are weighted that of every one on its own."""
        student, teacher, classes, weights = compared
        with torch.autocast(student.source.device.type, enabled=False):
            labels = known = None
            if term.samples is not None or weights is not None or isinstance(term.temperature, Observing):
                labels, known = type(student).compared_labels(batch.target, classes)
            if isinstance(term.temperature, Observing) and self._checked:
                term.temperature.observe(student, teacher, labels, known)
            if term.samples is not None:
                found = term.samples(student, teacher, labels)
                if tuple(found.shape) != (len(student.source),):
                    raise DistillError(
                        f'{type(term.samples).__name__} must return one weight per image, ({len(student.source)},), '
                        f'got {tuple(found.shape)}.'
                    )
                weights = found if weights is None else weights * found
            if weights is None:
                return type(student).compare(term.loss, term.declared, student, teacher, batch.target, classes)
            values = [
                type(student).compare(
                    term.loss,
                    term.declared,
                    student.image(i),
                    teacher.image(i),
                    None if batch.target is None else batch.target[i : i + 1],
                    classes,
                )
                for i in range(len(weights))
            ]
            weighted = weights.detach() * torch.stack(values)
            if known is None or compared.weights is not None:
                return weighted.mean()
            # Images that do not count are 0 each, and no part of the mean either.
            return weighted.sum() / known.sum().clamp(min=1)

    def _tensor_loss(self, term: Term, pairs: list[tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
        classes = self.matching.classes_of(term)
        values = []
        for level, (student, teacher) in enumerate(pairs):
            student, teacher = self.parts.bring(term, level, student, teacher, batch)
            if term.consumes == 'features' and student.dim() == teacher.dim() == 3:
                # Channels second, as in maps.
                student, teacher = student.transpose(1, 2), teacher.transpose(1, 2)
            if not _fit(term, student, teacher):
                advice = "write adapter='auto'" if term.adapter is None else 'choose taps or an adapter that fit'
                raise DistillError(
                    f'student {str(term.student)!r} is {shapes([student])} but teacher {str(term.teacher)!r} is '
                    f'{shapes([teacher])}; {advice}.'
                )
            if term.projects:
                # Projectors make all of the teacher's classes: which are shared is known later than their size.
                known = None if classes is None else (classes[1], classes[1])
                kind = self.matching.teacher_classes(term, batch).activation
                pair = align_classes(ClassPredictions(student, kind), ClassPredictions(teacher, kind), known)
                values.append(self._compare(term, Compared(*pair, classes), batch))
                continue
            loss = self.parts.loss(term, level)
            # Also for users' own losses: half precision overflows.
            with torch.autocast(student.device.type, enabled=False):
                if term.declared.needs_target:
                    values.append(loss(as_full(student), as_full(teacher), batch.target))
                else:
                    values.append(loss(as_full(student), as_full(teacher)))
        return torch.stack(values).mean()

    # ------------------------------------------------------------------ with the student's optimizer
    def attach(self, optimizer: Optimizer, clip: Clip | float | None = None, scaler: Any = None) -> None:
        """Let adapters and teachers follow the student's optimizer; after :meth:`check`.

        Args:
            optimizer: The student's.
            clip: How the framework clips gradients, see `AdapterOptimizer`.
            scaler: Its ``GradScaler``, or what returns it, see `AdapterOptimizer`.
        """
        self.detach()
        if self.trainable:
            self.optimizer = AdapterOptimizer(self.bank, optimizer, clip=clip, scaler=scaler)
        self._handles = [optimizer.register_step_post_hook(self._after_step)]
        if self._freezes:
            self._handles.append(optimizer.register_step_pre_hook(torch.compiler.disable(self.freezer.before_step)))
        self.follows = optimizer

    def detach(self) -> None:
        """Leave the student's optimizer as it was found."""
        for handle in self._handles:
            handle.remove()
        if self.optimizer is not None:
            self.optimizer.close()
        self.freezer.release()
        self._handles, self.optimizer, self.follows = [], None, None

    def _after_step(self, *step: Any) -> None:
        for teacher in self.teachers.values():
            teacher.after_step()

    @property
    def trainable(self) -> bool:
        """Whether there is anything to train besides the student."""
        return trainable(self.bank)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; empty where a checkpoint of the student says it all."""
        found: dict[str, Any] = {} if self.optimizer is None else dict(self.optimizer.state())
        parts = {
            'teachers': {name: saved for name, t in self.teachers.items() if (saved := dict(t.state()))},
            'weights': {name: t.ratio.state() for name, t in self.terms.items() if t.ratio is not None},
            'temperatures': {name: found.state() for name, found in self._observing.items()},
        }
        return {**found, **{key: saved for key, saved in parts.items() if saved}}

    def load_state(self, state: Mapping[str, Any], source: str) -> None:
        """Restore what :meth:`state` returned; after :meth:`attach`.

        Args:
            state: What it returned.
            source: Where it was saved, for messages.

        Raises:
            DistillError: Something is missing, or belongs to another run.
        """
        if self.optimizer is not None:
            if 'adapters' not in state:
                raise DistillError(
                    f'{source} to resume from holds no adapters, so it was not written by this distilled run; to '
                    'start a distilled run from its weights use load_from without --resume.'
                )
            self.optimizer.load_state(state, source)
        for name, weight in state.get('weights', {}).items():
            # One that is new in the resumed run is found from its first batches.
            ratio = self.terms[name].ratio if name in self.terms else None
            if ratio is not None:
                ratio.load_state(weight)
        for name, temperature in self._observing.items():
            if name in state.get('temperatures', {}):
                temperature.load_state(state['temperatures'][name])
        saved = state.get('teachers', {})
        for name, teacher in self.teachers.items():
            if teacher.state() and not all(map(self.over, self._of(name))):
                if name not in saved:
                    raise DistillError(
                        f'{source} to resume from holds nothing of the teacher {name!r} ({teacher.mode}), so it was '
                        'not written by this distilled run; start anew from its weights.'
                    )
                teacher.load_state(saved[name])

    # ------------------------------------------------------------------ around the losses
    def proportion(self) -> str | None:
        """A sentence when KD was out of proportion since the last call, with what to write; once per direction."""
        live, now = self.live, self.position
        # Weights that are still on their way up are small on purpose, and with alpha=1 KD is to be all there is.
        rising = any(t.weight(now.end) > self.weight(t) for t in live)
        found = None if self.alpha == 1 else self.balance.verdict(low=not rising)
        if found is None:
            return None
        verdict, factor = found
        advice = 'lower the weights' if factor < 1 else 'raise the weights'
        if live and math.isfinite(factor):
            constant = [isinstance(t.weight, Constant) and t.ratio is None for t in live]
            numbers = [f'{t.name}: weight={_rounded(t.weight(now) * factor)}' for t in live]
            if not all(constant):
                advice += f': {_rounded(factor)} times what they are'
            elif len(numbers) == 1:
                advice += f': {numbers[0].partition(": ")[2]}'
            else:
                advice += f': {", ".join(numbers)}'
            advice += f' would give {AIM:g}'
        return f'{verdict}; {advice}'

    @property
    def share(self) -> tuple[float | None, float | None]:
        """``kd_ratio`` in the first and the last iterations, as logged; None where stages or alpha=1 leave no one."""
        if len(self._alphas) > 1:
            return None, None
        (alpha,) = self._alphas
        own = 1.0 if alpha is None else 1 - alpha
        first, last = self.balance.share()
        return tuple(None if value is None or not own else value / own for value in (first, last))  # type: ignore[return-value]

    def refuse_nan(self, task: Tensor, losses: Mapping[str, Tensor]) -> None:
        """In the first distilled iteration only (it synchronises): real images can overflow what the check did not.

        Args:
            task: The student's own loss.
            losses: What :meth:`losses` returned.

        Raises:
            DistillError: A KD loss is not finite, while the student's own is.
        """
        if self._asked != 1:
            return
        wrong = [k for k, v in losses.items() if not torch.isfinite(v)]
        if wrong and torch.isfinite(task):
            raise DistillError(
                f"{wrong[0]} is {losses[wrong[0]].item()} in its first iteration, while the student's own loss is "
                "finite: the teacher's outputs overflow on these images; check its checkpoint, normalisation and "
                'precision.'
            )

    @contextmanager
    def _running(self, side: str, model: nn.Module, inputs: Tensor) -> Iterator[None]:
        """Names the model, where an exception of its own would only say what it stumbled over."""
        try:
            yield
        except DistillError as error:
            raise DistillError(f'{side}: {error}') from error
        except Exception as error:
            size = 'x'.join(map(str, inputs.shape[-2:]))
            raise CannotRunError(
                f'The {side} ({type(model).__name__}) cannot be run on an image of {inputs.shape[1]} channel(s) and '
                f'{size} pixels: {in_words(error)}; if it was made for one size only, write that as '
                f'{self.host.size_option(side)}.'
            ) from error


def _rounded(value: float) -> str:
    return f'{float(f"{value:.2g}"):g}'


def _refuse_too_few(term: Term, images: int) -> None:
    # What declares nothing is asked on two images, and may well do with one.
    if isinstance(term.loss, DistillLoss) and images < term.declared.images:
        raise DistillError(
            f'{type(term.loss).__name__} compares the images of a batch with each other, and batches of {images} are '
            f'too few: it would be 0; make them {term.declared.images} or more per process, or take another loss.'
        )


def _refuse_frozen(term: Term, tensors: Sequence[Tensor]) -> None:
    if not any(t.requires_grad for t in tensors):
        raise DistillError(
            f'the student tap {str(term.student)!r} carries no gradient, so distilling there trains nothing; '
            'it is frozen, or inside an activation-checkpointed module: tap a trainable module, or the '
            'checkpointed module itself.'
        )


def _refuse_constant(term: Term, temperature: LearnedTemperature, value: Callable[[], Tensor]) -> None:
    """Refuse to learn the temperature of a loss through which no gradient reaches it."""
    loss: Any = term.loss
    before = loss.temperature
    try:
        with torch.enable_grad():
            loss.temperature = temperature.value()
            found = value()
            known = found.requires_grad and torch.autograd.grad(found, temperature.theta, allow_unused=True)[0]
    finally:
        loss.temperature = before
    if known is None or known is False:
        raise DistillError(
            f'{type(term.loss).__name__} takes its temperature as a constant, so it cannot be learned; write a number '
            "or a schedule, or take loss=dict(type='KLDivLoss')."
        )


def _fit(term: Term, student: Tensor, teacher: Tensor) -> bool:
    """Whether the shapes are what a loss can compare."""
    if student.shape[:1] != teacher.shape[:1]:
        return False
    if term.declared.any_grid:
        return True
    start = 2 if term.declared.any_channels else 1
    return student.dim() == teacher.dim() and student.shape[start:] == teacher.shape[start:]


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


def _like(inputs: Any, model: nn.Module) -> Tensor:
    return inputs if isinstance(inputs, Tensor) else next(model.parameters())
