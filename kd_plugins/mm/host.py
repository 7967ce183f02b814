"""MMEngine as the engine sees it: models of the MM family, their labels, and where the run is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import IterBasedTrainLoop
from torch import Tensor, nn

from kd_plugins.classification.weights import classifier_modules
from kd_plugins.distiller import Host, Position, Tap
from kd_plugins.distiller.stages import rest_of
from kd_plugins.mm.forward import openmmlab_tap, run_modules
from kd_plugins.mm.task import CLASSIFICATION, task_of

#: Parts of a model that are no head.
BODY = ('backbone', 'neck', 'data_preprocessor')


class MMHost(Host):
    """A model of mmdet, mmseg or timm in MMEngine's Runner."""

    def __init__(self, student: nn.Module) -> None:
        self.task = task_of(student)

    def tap(self, student: nn.Module, tap: Tap) -> Tap:
        return openmmlab_tap(student, tap, 'student')

    def part(self, student: nn.Module, name: str) -> list[nn.Module]:
        if name in student._modules or name not in ('backbone', 'head'):
            return super().part(student, name)
        if self.task is CLASSIFICATION:
            heads = classifier_modules(student.get_submodule('net'))
            return heads if name == 'head' else rest_of(student.get_submodule('net'), heads)
        if name == 'backbone':
            return super().part(student, name)
        return [m for n, m in student._modules.items() if m is not None and n not in BODY]

    def head(self, student: nn.Module) -> str:
        return openmmlab_tap(student, Tap(self.task.head), 'student').module if self.task.head else ''

    def run(self, student: nn.Module, inputs: Any, samples: Any, modules: Sequence[str]) -> None:
        run_modules(student, inputs, samples, modules)

    def targets(self, inputs: Any, samples: Any) -> Tensor | None:
        return self.task.targets(inputs, samples)

    def size_option(self, side: str) -> str:
        return self.task.sized_by if side == 'student' else super().size_option(side)

    def missed(self, student: nn.Module) -> str:
        own: Any = type(student)
        if own.train_step is not BaseModel.train_step:
            return (
                f"{own.__name__} has a train_step of its own, which does not call self(**data, mode='loss'), where "
                'the hook adds its losses'
            )
        return f"nothing called {own.__name__} with mode='loss', where the hook adds its losses"


def image_counts(dataset: Any, classes: int) -> list[int] | None:
    """Number of images of each class in a data set of MMEngine's protocol, wrapped ones included.

    Args:
        dataset: It.
        classes: How many classes there are.

    Returns:
        One number per class; None where its items tell no class of the whole image.
    """
    counts = [0] * classes
    for index in range(len(dataset)):
        try:
            label = dataset.get_data_info(index)['gt_label']
        except (AttributeError, KeyError, TypeError):
            return None
        for found in label if isinstance(label, (list, tuple)) else [label]:
            if not 0 <= int(found) < classes:
                return None
            counts[int(found)] += 1
    return counts


def find_in_registries(name: str) -> Callable[..., nn.Module] | None:
    """A user's loss or adapter from MMEngine's registries, in the scope of the running config; None if unknown."""
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry.get(name)


def position_of(runner: Any) -> Position:
    """Where the next iteration is."""
    unit, done, total = unit_of(runner)
    if unit == 'iteration':
        return Position(runner.iter, runner.max_iters, done)
    return Position(runner.iter, runner.max_iters, done, runner.iter * total / max(runner.max_iters, 1), total)


def unit_of(runner: Any) -> tuple[str, int, int]:
    """What ``start`` and ``stop`` are counted in: ``('epoch', done, total)``, or iterations in an iteration loop."""
    loop = runner.train_loop
    if isinstance(loop, IterBasedTrainLoop):
        return 'iteration', loop.iter, loop.max_iters
    return 'epoch', loop.epoch, loop.max_epochs
