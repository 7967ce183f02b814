"""The distiller: from what was captured in student and teacher to weighted, named losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.adapters import auto_adapter, describe_adapter
from kd_plugins.distiller.summary import Row
from kd_plugins.distiller.taps import Call, Capture, find_module
from kd_plugins.distiller.teacher import Teacher
from kd_plugins.distiller.terms import Resolver, Term, build_adapter
from kd_plugins.errors import DistillError
from kd_plugins.predictions import DensePredictions, align, find_reader, read

Classes = tuple[Sequence[int], Sequence[int]] | None


class AdapterBank(nn.Module):
    """The trainable parts of a distillation: real sub-modules, but absent from every state dict.

    They sit in the student so that the optimizer, DDP and EMA see them, while the student's checkpoints keep exactly
    the keys of the plain model. Their state travels under a checkpoint key of its own (:meth:`export_state`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(_drop_own_keys)
        self._register_load_state_dict_pre_hook(_keep_own_values, with_module=True)

    def export_state(self) -> dict[str, Tensor]:
        """Adapter weights on the CPU by name, for the checkpoint's own entry."""
        return {k: v.detach().cpu().clone() for k, v in _own_tensors(self, '').items()}

    def import_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Restore what :meth:`export_state` returned.

        Raises:
            DistillError: The state belongs to other adapters.
        """
        own = _own_tensors(self, '')
        wrong = sorted(set(own) ^ set(state)) + [k for k in own if k in state and own[k].shape != state[k].shape]
        if wrong:
            raise DistillError(
                f'The adapters saved in {source} are not those of this config ({", ".join(wrong[:3])}); resume with '
                'the terms the run was started with, or start anew from load_from.'
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])


def _own_tensors(bank: nn.Module, prefix: str) -> dict[str, Tensor]:
    persistent = {}
    for path, module in bank.named_modules():
        start = f'{prefix}{path}.' if path else prefix
        for key, value in module._parameters.items():
            if value is not None:
                persistent[start + key] = value
        for key, value in module._buffers.items():
            if value is not None and key not in module._non_persistent_buffers_set:
                persistent[start + key] = value
    return persistent


# Module-level functions, so that the EMA's deep copy of the bank carries hooks that act on the copy.
def _drop_own_keys(bank: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    for key in _own_tensors(bank, prefix):
        state.pop(key, None)


def _keep_own_values(bank: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    # A load finds the bank's current values, so it is complete without them being in the file.
    for key, value in _own_tensors(bank, prefix).items():
        state.setdefault(key, value.detach())


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
    """Predictions read once per iteration and used by several terms."""

    read: dict[tuple[str, str], DensePredictions] = field(default_factory=dict)
    aligned: dict[tuple[str, str], tuple[DensePredictions, DensePredictions]] = field(default_factory=dict)


class Distiller:
    """Turns captured tensors into KD losses.

    Args:
        student: The plain student model (unwrapped).
        teacher: The teacher.
        terms: Terms by name.
        classes: ``(student_index, teacher_index)`` of the classes both know, or None when the sets are equal.
        start: First epoch (iteration in an iteration-based run) with KD.
        stop: First epoch (iteration) without it again, or None.
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
        resolve: Resolver | None = None,
        bank: AdapterBank | None = None,
    ) -> None:
        self.student, self.teacher, self.terms, self.classes = student, teacher, terms, classes
        self.start, self.stop = start, stop
        self.bank = bank if bank is not None else AdapterBank()
        self._resolve = resolve
        self._free: dict[str, nn.ModuleList] = {}
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
        if now < self.start or (self.stop is not None and now >= self.stop):
            return False
        return any(self.weight(t) > 0 for t in self.terms.values())

    def weight(self, term: Term) -> float:
        """A term's weight at the current position."""
        return term.weight(self.position.progress)

    # ------------------------------------------------------------------ before the first iteration
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
        for term in self.terms.values():
            if term.consumes == 'predictions':
                # Before anything runs: some of these models cannot even be run without annotations.
                for side, model, tap in (
                    ('student', self.student, term.student),
                    ('teacher', self.teacher.model, term.teacher),
                ):
                    module = find_module(model, tap.module, side)
                    try:
                        find_reader(module)
                    except DistillError as error:
                        raise DistillError(f'term {term.name!r}: {side} {tap.module!r}: {error}') from error
        modes = [(m, m.training) for m in self.student.modules()]
        capture = self.capture()
        try:
            self.student.eval()
            for module in capture.modules.values():
                if _readable(module):
                    # Only the head's own flag: it returns its training form while BN statistics stay.
                    module.training = True
            with torch.no_grad(), capture:
                run_student(self.student, inputs, samples, tuple(capture.modules))
        finally:
            for module, training in modes:
                module.training = training
        with torch.no_grad():
            taught = self._run_teacher(inputs, samples, list(self.terms.values()))
            rows = [self._check_term(term, capture, taught, build_adapters) for term in self.terms.values()]
            if check_values:
                for term in self.terms.values():
                    self._refuse_nan(term, capture, taught)
        return rows

    def _check_term(self, term: Term, student: Capture, teacher: Capture, build: bool) -> Row:
        where = f'term {term.name!r}'
        try:
            if self._reads_predictions(term, student, teacher):
                if build and not self._has_parts(term):
                    self._keep(term, nn.ModuleList())
                s, t = self._predictions(term, student, teacher, _Shared())
                value = self._call_loss(term, s, t)
                shapes = _describe(s), _describe(t)
                adapter = 'none'
            else:
                pairs = self._pairs(term, student, teacher)
                if build and not self._has_parts(term):
                    self._build_adapters(term, pairs)
                value = self._tensor_loss(term, pairs)
                shapes = _shapes([p[0] for p in pairs]), _shapes([p[1] for p in pairs])
                adapter = self._describe_adapters(term, pairs)
        except DistillError as error:
            raise DistillError(f'{where}: {error}') from error
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
            parameters=sum(p.numel() for p in self._adapters(term).parameters()),
            weight=str(term.weight),
        )

    def _refuse_nan(self, term: Term, student: Capture, teacher: Capture) -> None:
        tensors = teacher.maps(term.teacher)
        if self._reads_predictions(term, student, teacher):
            # Large raw outputs are finite, but the boxes decoded from them may not be.
            _, decoded = self._predictions(term, student, teacher, _Shared())
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
            if term.adapter == 'auto' and term.consumes == 'features':
                adapter = auto_adapter(tuple(student.shape), tuple(teacher.shape))
            elif term.adapter is None or term.adapter == 'auto':
                adapter = None
            elif isinstance(term.adapter, Mapping):
                adapter = build_adapter(term, term.adapter, 'adapter', self._resolve)
            else:
                adapter = term.adapter
            built.append(_Identity() if adapter is None else adapter)
        self._keep(term, nn.ModuleList(built))

    def _keep(self, term: Term, adapters: nn.ModuleList) -> None:
        parts = nn.ModuleDict({'adapters': adapters})
        if _trainable(term.loss):
            parts['loss'] = term.loss
        if _trainable(parts):
            self.bank.add_module(term.name, parts)
        else:
            self._free[term.name] = parts

    def _has_parts(self, term: Term) -> bool:
        return term.name in self._free or term.name in self.bank._modules

    def _adapters(self, term: Term) -> nn.ModuleList:
        parts = self.bank._modules.get(term.name) or self._free.get(term.name)
        return parts['adapters'] if parts is not None else _NONE

    def _describe_adapters(self, term: Term, pairs: list[tuple[Tensor, Tensor]]) -> str:
        words = [
            describe_adapter(None if isinstance(a, _Identity) else a, tuple(s.shape), tuple(t.shape))
            for a, (s, t) in zip(self._adapters(term), pairs, strict=True)
        ]
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
            taught = self._run_teacher(inputs, samples, live)
            shared = _Shared()
            for term in live:
                if term.temperature is not None:
                    term.loss.temperature = term.temperature(self.position.progress)
                try:
                    value = self._term_loss(term, capture, taught, shared)
                except DistillError as error:
                    raise DistillError(f'term {term.name!r}: {error}') from error
                result[f'loss_kd_{term.name}'] = value * self.weight(term)
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

    def _term_loss(self, term: Term, student: Capture, teacher: Capture, shared: _Shared) -> Tensor:
        if self._reads_predictions(term, student, teacher):
            s, t = self._predictions(term, student, teacher, shared)
            source = s.cls
            value = self._call_loss(term, s, t)
        else:
            pairs = self._pairs(term, student, teacher)
            source = pairs[0][0]
            value = self._tensor_loss(term, pairs)
        if not source.requires_grad and torch.is_grad_enabled():
            raise DistillError(
                f'the student tap {str(term.student)!r} carries no gradient, so distilling there trains nothing; '
                'it is frozen, or inside an activation-checkpointed module: tap a trainable module, or the '
                'checkpointed module itself.'
            )
        return value

    def _reads_predictions(self, term: Term, student: Capture, teacher: Capture) -> bool:
        if term.consumes == 'features':
            return False
        sides = (
            ('student', student.modules[term.student.module], term.student),
            ('teacher', teacher.modules[term.teacher.module], term.teacher),
        )
        readable = [_readable(m) and tap.index is None for _, m, tap in sides]
        if term.consumes == 'predictions':
            for (_, module, tap), ok in zip(sides, readable, strict=True):
                if not ok:
                    find_reader(module)  # refuses with the heads that can be read
                    raise DistillError(
                        f'{type(term.loss).__name__} compares whole heads: write {tap.module!r}, not {tap}.'
                    )
        return all(readable)

    def _predictions(
        self, term: Term, student: Capture, teacher: Capture, shared: _Shared
    ) -> tuple[DensePredictions, DensePredictions]:
        key = (term.student.module, term.teacher.module)
        if key not in shared.aligned:
            sides = []
            for side, capture, path in (('student', student, key[0]), ('teacher', teacher, key[1])):
                if (side, path) not in shared.read:
                    call: Call = capture.call(path)
                    device = next(t.device for t in capture.maps(term.student if side == 'student' else term.teacher))
                    with torch.autocast(device.type, enabled=False):
                        found = read(capture.modules[path], call.output, training=call.training).float()
                    shared.read[side, path] = found
                sides.append(shared.read[side, path])
            shared.aligned[key] = align(sides[0], sides[1].detach(), self.classes)
        return shared.aligned[key]

    def _call_loss(self, term: Term, student: DensePredictions, teacher: DensePredictions) -> Tensor:
        with torch.autocast(student.cls.device.type, enabled=False):
            if term.consumes == 'predictions':
                return term.loss(student, teacher)
            # A loss on logits may know what to make of a whole head (its objectness, for one).
            if hasattr(term.loss, 'from_predictions'):
                return term.loss.from_predictions(student, teacher)
            return term.loss(student.class_logits(), teacher.class_logits())

    def _pairs(self, term: Term, student: Capture, teacher: Capture) -> list[tuple[Tensor, Tensor]]:
        ours, theirs = student.maps(term.student), teacher.maps(term.teacher)
        if len(ours) != len(theirs):
            raise DistillError(
                f'student tap {str(term.student)!r} has {len(ours)} tensors {_shapes(ours)} but teacher tap '
                f'{str(term.teacher)!r} has {len(theirs)} {_shapes(theirs)}; pick levels, e.g. '
                f'student={term.student.module + "[0]"!r}, teacher={term.teacher.module + "[0]"!r}.'
            )
        return [(s, t.detach()) for s, t in zip(ours, theirs, strict=True)]

    def _tensor_loss(self, term: Term, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        adapters = self._adapters(term)
        values = []
        for level, (student, teacher) in enumerate(pairs):
            if len(adapters):
                student = adapters[level](student, teacher)
            if student.shape != teacher.shape:
                advice = "write adapter='auto'" if term.adapter is None else 'choose taps or an adapter that fit'
                raise DistillError(
                    f'student {str(term.student)!r} is {_shapes([student])} but teacher {str(term.teacher)!r} is '
                    f'{_shapes([teacher])}; {advice}.'
                )
            # Also for users' own losses: half precision overflows.
            with torch.autocast(student.device.type, enabled=False):
                values.append(term.loss(_full(student), _full(teacher)))
        return torch.stack(values).mean()


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class _Identity(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return student


_NONE = nn.ModuleList()


def _trainable(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _readable(module: nn.Module) -> bool:
    try:
        find_reader(module)
    except DistillError:
        return False
    return True


def _device(inputs: Any, model: nn.Module) -> torch.device:
    return _like(inputs, model).device


def _like(inputs: Any, model: nn.Module) -> Tensor:
    return inputs if isinstance(inputs, Tensor) else next(model.parameters())


def _shapes(tensors: Sequence[Tensor]) -> str:
    shown = ', '.join('x'.join(map(str, t.shape[1:])) for t in tensors[:5])
    return shown + (', ...' if len(tensors) > 5 else '')


def _describe(p: DensePredictions) -> str:
    parts = [f'{p.num_classes} classes']
    parts += [n for n in ('obj', 'box', 'dist') if getattr(p, n) is not None]
    if p.box is None and p.ltrb is not None:
        parts.append('ltrb')
    strides = '/'.join(f'{s:g}' for s in p.strides)
    return f'{p.cls.shape[1]} positions, strides {strides}, ' + '+'.join(parts)
