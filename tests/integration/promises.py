"""What the promises of a distilled run are checked with: cases, records of runs, and comparisons. No framework."""

from __future__ import annotations

import copy
import os
import pickletools
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from kd_plugins.distiller import Session
    from kd_plugins.teachers.base import ModelTeacher

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """A student, its teacher and what it is taught.

    Args:
        family: Which of its lab's students.
        terms: What is taught, as the lab's framework writes it.
        form: How it is written in a config; the lab knows.
        trained: Names of the terms with something that is trained too.
        options: Of the plain run, see `plain` of a lab.
        teacher: Options of the lab's `teacher`.
        distill: ``start``, ``stop``, ``alpha``.
        noise: Classes of the student's modules that draw random numbers in training.
        tapped: Paths of the student's modules whose outputs are captured.
        on: Where distillation is on, a digit per iteration.
        idle: Whether a batch may hold nothing to teach.
        recompute: Options of the plain run with which activations are recomputed; none: the network does so itself.
        inside: Path of a module that is then run twice.
        normed: How many maps adapters keep statistics of.
        frozen: What the names of the student's parameters begin with that its stages freeze while ``on`` is 0.
        long: Whether its tests are of `make test-long`: another case shows nearly the same.
    """

    family: str
    terms: Mapping[str, Any]
    form: str = 'hook_form'
    trained: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, Any] = field(default_factory=dict)
    distill: Mapping[str, Any] = field(default_factory=dict)
    noise: tuple[str, ...] = ()
    tapped: tuple[str, ...] = ()
    on: str = ''
    idle: bool = False
    recompute: Mapping[str, Any] = field(default_factory=dict)
    inside: str = ''
    normed: int = 0
    frozen: str = ''
    long: bool = False

    def but(self, **changes: Any) -> Case:
        """The same case with other options: mappings are updated, but for ``terms``; all else is replaced."""
        merged = {
            k: {**getattr(self, k), **v} if k in ('options', 'teacher', 'distill') else v for k, v in changes.items()
        }
        return replace(self, **merged)

    def silent(self) -> Case:
        """The same terms without weight."""
        return self.but(terms=weighted(self.terms, 0.0))


def weighted(terms: Mapping[str, Any], weight: Any) -> dict[str, Any]:
    """The same terms, all of this weight; in Ultralytics' short form a term is its weight."""
    return {
        name: {**copy.deepcopy(term), 'weight': weight} if isinstance(term, Mapping) else copy.deepcopy(weight)
        for name, term in terms.items()
    }


class Step(NamedTuple):
    """What an iteration logged: the total, the task's losses, and what distillation adds (a ratio included)."""

    total: float
    own: dict[str, float]
    kd: dict[str, float]


class Record:
    """What a run did, and what it left.

    Attributes:
        steps: What every iteration logged.
        states: Weights of student and average after every iteration, if they were asked for.
        inputs: The batches that the student was given, as its network takes them.
        generators: Where every random generator stood after an iteration.
        runs: How often the teacher had been run, after every iteration; before the first one, this counts dry runs.
        dry_runs: How often it was run before the first iteration.
        ran: Iterations in which any of the teacher's modules was run.
        prints: Fingerprints of the teacher, one per iteration.
        awake: Modules of the teacher that were in training mode, or of the student that were not, after iterations.
        steady: Whether the teacher gave the same answer twice, after every iteration.
        validated: The metrics of every validation.
        ran_in_validation: How often the teacher was run meanwhile.
        tapped: Runs of the student's network with a tap on it, by whether it was training.
        weights: Of student and average in the end, without adapters.
        untrained: State of the trained parts of distillation before the first iteration.
        adapters: And in the end.
        learned: Names of the parameters among them.
        files: Checkpoints in the order in which they were saved.
        model: The student.
        served: What a user has in hand after the run, where that is another object.
        averaged: The average of the student.
        updates: How often it was updated.
        optimized: Parameters that the optimizer knows.
        session: The distillation, None of a plain run.
        teacher: Its teacher.
        run: The framework's runner or trainer.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.states: list[dict[str, Tensor]] = []
        self.inputs: list[Tensor] = []
        self.generators: list[tuple] = []
        self.runs: list[int] = []
        self.dry_runs = self.ran_in_validation = self.updates = 0
        self.ran: set[int] = set()
        self.prints: list[str] = []
        self.awake: list[str] = []
        self.steady: list[bool] = []
        self.validated: list[dict] = []
        self.tapped = {True: 0, False: 0}
        self.weights: dict[str, Tensor] = {}
        self.untrained: dict[str, Tensor] = {}
        self.adapters: dict[str, Tensor] = {}
        self.learned: set[str] = set()
        self.files: list[Path] = []
        self.model: nn.Module | None = None
        self.served: nn.Module | None = None
        self.averaged: nn.Module | None = None
        self.optimized: list[Tensor] = []
        self.session: Session | None = None
        self.teacher: ModelTeacher | None = None
        self.run: Any = None
        self._count, self._asking = 0, False
        self._before: int | None = None
        self._handles: list[Any] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the runs of any teacher."""
        # Not above: a run that shall be without this package imports its lab.
        from kd_plugins.teachers.base import ModelTeacher

        inner = ModelTeacher.outputs

        def outputs(teacher: ModelTeacher, *args: Any) -> Any:
            self._count += not self._asking
            return inner(teacher, *args)

        with mock.patch.object(ModelTeacher, 'outputs', outputs):
            yield

    def begin(self, session: Session | None) -> None:
        """Before the first iteration, with the distillation of the run."""
        self.dry_runs, self.session = self._count, session
        if session is None:
            return

        def ran(*_: Any) -> None:
            if not self._asking:
                self.ran.add(len(self.steps))

        self.teacher, self.untrained = session.teacher, session.bank.export_state()
        self.learned = set(session.bank.trainable())
        for module in self.teacher.model.modules():
            self._handles.append(module.register_forward_pre_hook(ran))

    def step(
        self, model: nn.Module, step: Step, image: Tensor, taps: Callable[[ModelTeacher], tuple[str, ...]]
    ) -> None:
        """After an iteration.

        Args:
            model: The student.
            step: What was logged.
            image: A batch about which the teacher is asked twice.
            taps: The modules of the teacher whose outputs have to be equal.
        """
        self.steps.append(step)
        numpys = [np.asarray(part).tolist() for part in np.random.get_state()]
        self.generators.append((torch.get_rng_state().tolist(), random.getstate(), *numpys))
        self.runs.append(self._count - self.dry_runs)
        if self.teacher is None:
            return
        self.prints.append(self.teacher.fingerprint())
        self.awake += [n for n, m in self.teacher.model.named_modules() if m.training]
        self.awake += [] if model.training else ['the student is not training']
        self._asking = True
        once, again = (list(self._answer(image, taps(self.teacher))) for _ in range(2))
        self.steady.append(len(once) > 0 and all(torch.equal(a, b) for a, b in zip(once, again, strict=True)))
        self._asking = False

    def _answer(self, image: Tensor, taps: tuple[str, ...]) -> Iterator[Tensor]:
        found = self.teacher.outputs(image, None, taps)
        for tap in taps:
            (call,) = found.calls[tap]
            yield from tensors(call.output)

    def begin_validation(self) -> None:
        """Before a validation."""
        self._before = self._count

    def end_validation(self, metrics: dict) -> None:
        """After it; without a beginning it was none."""
        if self._before is not None:
            self.validated.append(dict(metrics))
            self.ran_in_validation += self._count - self._before
        self._before = None

    def end(self) -> None:
        """Take off what was attached."""
        self.adapters = self.session.bank.export_state() if self.session is not None else {}
        for handle in self._handles:
            handle.remove()


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers, in order."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [t for v in values for t in tensors(v)]


def is_on(step: Step) -> bool:
    """Whether all that distillation logs was on in an iteration, or all off."""
    (value,) = {v > 0 for v in step.kd.values()}
    return value


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest deviation per key where two states are not bit-identical; keys of one side only are infinitely far."""
    far = {k: float('inf') for k in set(one) ^ set(other)}
    for key in set(one) & set(other):
        if not torch.equal(one[key], other[key]):
            far[key] = (one[key].double() - other[key].double()).abs().max().item()
    return far


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def restless(model: nn.Module) -> set[str]:
    """Classes of the modules that draw random numbers or keep statistics in training."""
    kept = [m for m in model.modules() if getattr(m, 'running_mean', None) is not None]
    drawing = [m for m in model.modules() if getattr(m, 'p', 0) or getattr(m, 'drop_prob', 0)]
    return {type(m).__name__ for m in (*kept, *drawing)}


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple]:
    """Shape and precision of every entry."""
    return {k: (v.shape, v.dtype) for k, v in state.items()}


def read(path: Any) -> Any:
    """The content of a checkpoint."""
    return torch.load(path, map_location='cpu', weights_only=False)


def pickled_modules(path: Any) -> set[str]:
    """The modules whose classes and functions a checkpoint refers to."""
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith('data.pkl')))
    strings: list[str] = []
    modules = set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == 'GLOBAL':
            modules.add(argument.split()[0])
        elif opcode.name == 'STACK_GLOBAL':
            modules.add(strings[-2])
        elif isinstance(argument, str):
            strings.append(argument)
    return modules


@contextmanager
def without(files: Any) -> Iterator[None]:
    """Meanwhile the files do not exist."""
    paths = [Path(f) for f in files]
    for path in paths:
        os.rename(path, f'{path}.gone')
    try:
        yield
    finally:
        for path in paths:
            os.rename(f'{path}.gone', path)


def run(*command: Any, cwd: Path | None = None, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in a child process; its output, both streams together, is in ``stdout``."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd or REPO,
        env={**os.environ, 'PYTHONPATH': str(REPO), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
    )
    if check and done.returncode:
        raise AssertionError(f'{command} ended with {done.returncode}:\n{done.stdout[-4000:]}')
    return done
