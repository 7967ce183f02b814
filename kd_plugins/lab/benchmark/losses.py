"""What a loss between two dense maps costs, forward and backward, next to the formula as one would write it.

At 8 x 150 x 512 x 512 (ADE20K) one map of class logits takes 1.2 GiB, and the plain formula seven of them: 3.5 times
its inputs. Both maps and the student's gradient are what no way of computing can do without: 1.5 times the inputs.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

import kd_plugins.losses as losses
from kd_plugins.errors import DistillError, nearest
from kd_plugins.lab.benchmark.benchmark import Benchmark, Run, Use, judged
from kd_plugins.lab.benchmark.measure import Ratio

DEFAULT = 'pixelwise_kl_div'
#: Peak memory over the bytes of both inputs.
MEMORY_AIM = 2.0
#: What a loss may consume to be measured here: two maps.
MAPS = ('features', 'masks', 'segmentation')
#: Of every loss that has one.
TEMPERATURE = 2.0


def _plain_pixelwise(student: Tensor, teacher: Tensor) -> Tensor:
    log_student = functional.log_softmax(student / TEMPERATURE, 1)
    divergence = functional.kl_div(log_student, functional.softmax(teacher / TEMPERATURE, 1), reduction='sum')
    return TEMPERATURE**2 * divergence / (len(student) * student[0, 0].numel())


def _plain_channel_wise(student: Tensor, teacher: Tensor) -> Tensor:
    log_student = functional.log_softmax(student.flatten(2) / TEMPERATURE, 2)
    target = functional.softmax(teacher.flatten(2) / TEMPERATURE, 2)
    divergence = functional.kl_div(log_student, target, reduction='sum')
    return TEMPERATURE**2 * divergence / (student.shape[0] * student.shape[1])


#: The formula in the fewest calls of torch, for the losses that have one.
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'channel_wise_div': _plain_channel_wise,
    'pixelwise_kl_div': _plain_pixelwise,
}


def map_losses() -> list[str]:
    """Names of the losses that compare two maps and need nothing else."""
    exported = [getattr(losses, name) for name in losses.__all__]
    consumes = {x.__module__: x.consumes for x in exported if isinstance(x, type) and issubclass(x, losses.DistillLoss)}
    functions = [x for x in exported if not isinstance(x, type) and consumes.get(x.__module__) in MAPS]
    return [f.__name__ for f in functions if _required(f) == 2]


def _required(function: Callable[..., Any]) -> int:
    return sum(p.default is p.empty for p in inspect.signature(function).parameters.values())


@dataclass(frozen=True, kw_only=True)
class MapLoss(Benchmark):
    """A loss of two maps, next to the plain formula where there is one.

    Attributes:
        loss: Name of a function in ``kd_plugins.losses``.
        shape: ``(B, C, H, W)`` of both maps.

    Raises:
        DistillError: The loss does not exist or does not compare two maps, a number is not positive, or the device is
            not there.
    """

    loss: str
    shape: tuple[int, int, int, int]
    repeats: int = 5
    steps: int = 1
    device: str = 'cpu'

    summary: ClassVar[str] = 'Time and peak memory of a loss between two dense maps against the plain formula.'
    epilog: ClassVar[str] = f'--loss takes {", ".join(map_losses())}; none: {DEFAULT}.'
    results: ClassVar[str] = 'losses'
    ours: ClassVar[str] = 'ours'
    rows: ClassVar[Mapping[str, Sequence[str]]] = {'ours': ['ours'], 'plain formula': ['plain']}
    aims: ClassVar = {'ratio': ('time, ours / plain', ['plain'], 1.0)}
    sizes: ClassVar = dict(shape=((2, 150, 512, 512),) * 2, repeats=(5, 5), steps=(1, 1))
    letters: ClassVar = dict(shape='BCHW')
    warmup: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.loss not in map_losses():
            raise DistillError(f'--loss {self.loss!r} is not a loss of two maps; {nearest(self.loss, map_losses())}')
        super().__post_init__()

    @classmethod
    def cases(cls, args: argparse.Namespace) -> list[MapLoss]:
        """One for each name after ``--loss``."""
        return [cls(loss=name, **cls.options(args, cls.sizes)) for name in dict.fromkeys(args.loss or [DEFAULT])]

    @property
    def functions(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """What is compared: ``'ours'``, and ``'plain'`` where there is such a formula."""
        ours = getattr(losses, self.loss)
        given = {'temperature': TEMPERATURE} if 'temperature' in inspect.signature(ours).parameters else {}
        result = {'ours': lambda student, teacher: ours(student, teacher, **given)}
        return {**result, 'plain': PLAIN[self.loss]} if self.loss in PLAIN else result

    @property
    def variants(self) -> tuple[str, ...]:
        """``'ours'``, and ``'plain'`` where there is such a formula."""
        return tuple(self.functions)

    def maps(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of student and teacher, float32."""
        draw = torch.Generator(self.device).manual_seed(0)
        student, teacher = (torch.randn(tuple(shape), generator=draw, device=self.device) for _ in range(2))
        return student.requires_grad_(), teacher

    def start(self, variants: Sequence[str], folder: Path | None, use: Use) -> Any:
        """Forward, and backward to the student's map."""
        student, teacher = self.maps(self.shape)

        def step(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
            return lambda: torch.autograd.grad(function(student, teacher), student)[0]

        return use({name: Run(step(self.functions[name])) for name in variants})

    def before_memory(self) -> None:
        """What torch loads and starts at its first steps belongs to no variant."""
        MapLoss(loss=self.loss, shape=(1, 2, 8, 8), device=self.device).start(
            self.variants, None, lambda runs: [run.step() for run in runs.values()]
        )

    def measure(self, timed: bool = True, with_memory: bool = True) -> dict[str, Any]:
        """As for every benchmark; and ``inputs`` (bytes of both maps) and ``memory_ratio`` (of ours over them)."""
        result = super().measure(timed, with_memory)
        inputs, used = 2 * 4 * torch.Size(self.shape).numel(), (result['memory'] or {}).get('ours')
        ratio = None if used is None else judged(Ratio.of([used], [inputs]), MEMORY_AIM)
        return dict(result, inputs=inputs, memory_ratio=ratio)

    # ------------------------------------------------------------------ report
    @classmethod
    def title(cls, result: Mapping[str, Any]) -> tuple[str, str, str]:
        """The loss, the shape of both maps, and the precision."""
        setup = result['setup']
        return f'{setup["loss"]}, forward and backward to the student', 'x'.join(map(str, setup['shape'])), 'float32'

    @classmethod
    def label(cls, row: str, result: Mapping[str, Any]) -> str:
        """Ours by its name."""
        return f'kd_plugins.losses.{result["setup"]["loss"]}' if row == 'ours' else row

    @classmethod
    def closing(cls, result: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What memory is compared with, memory, and time."""
        inputs, lines = result['inputs'], []
        for name, peak in (result['memory'] or {}).items():
            if peak is not None:
                ratio = result['memory_ratio']
                aim = f', aim <= {ratio["aim"]:.2f}: {ratio["verdict"]}' if name == 'ours' else ''
                lines.append((f'peak memory / inputs, {name}', f'{peak / inputs:.3f}{aim}'))
        return [('bytes of both inputs', f'{inputs / 2**20:.0f} MiB'), *lines, *super().closing(result)]
