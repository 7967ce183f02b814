"""The stages of a run: which terms are on, what of the student does not train, and how KD and labels balance."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from kd_plugins.distiller.schedules import Position
from kd_plugins.errors import DistillError, check_keys, nearest

STAGE_KEYS = ('until', 'terms', 'freeze', 'train', 'alpha')


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        until: Where it ends: an int is the first epoch (iteration in an iteration-based run) of the next stage, a float
            in (0, 1) that fraction of the run; None: with the run.
        terms: Names of the terms that are on, each within its own window; None: all. None of them: the student trains
            on its labels alone.
        freeze: Parts that do not train: ``'backbone'``, ``'neck'``, ``'head'``, or the path of a module.
        train: The reverse: all parts that train; empty: all that ``freeze`` leaves.
        alpha: Balance of this stage, see `kd_plugins.distiller.Session`; None: that of the run. 1: no labels.
    """

    until: float | None = None
    terms: tuple[str, ...] | None = None
    freeze: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    alpha: float | None = None

    def ends(self, position: Position) -> float | None:
        """The time at which it ends in the units of a run, see `Position.unit`."""
        if self.until is None or isinstance(self.until, int):
            return self.until
        whole = position.max_iterations if position.epochs is None else position.epochs
        return self.until * whole

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        values = {key: getattr(self, key) for key in STAGE_KEYS}
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v not in (None, ()) or k == 'terms'
        }

    def __str__(self) -> str:
        said = 'all terms' if self.terms is None else ', '.join(self.terms) or 'labels only'
        if self.freeze:
            said += f', {", ".join(self.freeze)} frozen'
        if self.train:
            said += f', only {", ".join(self.train)} trains'
        if self.alpha is not None:
            said += f', alpha {self.alpha:g}'
        if self.until is None:
            return f'{said} to the end'
        return (
            f'{said} until {self.until}' if isinstance(self.until, int) else f'{said} until {self.until:g} of the run'
        )


def build_stages(value: Any, check_alpha: Callable[[Any], float | None], where: str = 'stages') -> tuple[Stage, ...]:
    """Read the stages of a run.

    Args:
        value: A list of mappings with keys among `STAGE_KEYS`, or None.
        check_alpha: Reads ``alpha``.
        where: For messages.

    Raises:
        DistillError: A key is unknown, or the ends do not ascend.
    """
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DistillError(
            f"{where} must be a list such as [dict(until=0.3, terms=['neck'], freeze=['head']), dict()], got {value!r}."
        )
    stages = []
    for i, cfg in enumerate(value):
        at = f'{where}[{i}]'
        if not isinstance(cfg, Mapping):
            raise DistillError(f'{at} must be a mapping such as dict(until=0.3, freeze=["head"]), got {cfg!r}.')
        check_keys(cfg, STAGE_KEYS, at)
        until, last = cfg.get('until'), i == len(value) - 1
        whole = isinstance(until, int) and not isinstance(until, bool) and until > 0
        part = isinstance(until, float) and 0 < until < 1
        if (until is None) != last or (until is not None and not whole and not part):
            raise DistillError(
                f'{at}.until must be an epoch (iteration) >= 1 or a fraction of the run in (0, 1), and is left out of '
                f'the last stage only; got {until!r}.'
            )
        names = {key: names_in(cfg.get(key), f'{at}.{key}') for key in ('terms', 'freeze', 'train')}
        if names['freeze'] and names['train']:
            raise DistillError(f'{at} has both freeze and train; write what does not train, or all that does.')
        alpha = check_alpha(cfg.get('alpha'))
        stages.append(Stage(until, names['terms'], names['freeze'] or (), names['train'] or (), alpha))
    kinds = {type(s.until) for s in stages[:-1]}
    ends = [s.until for s in stages[:-1] if s.until is not None]
    if len(kinds) == 1 and any(a >= b for a, b in pairwise(ends)):
        raise DistillError(f'{where}: until must ascend from stage to stage, got {ends}.')
    if len(kinds) > 1:
        raise DistillError(f'{where}: until must be epochs (iterations) in every stage, or fractions; got {ends}.')
    return tuple(stages)


def names_in(value: Any, where: str) -> tuple[str, ...] | None:
    """A name, or a list of names; None stays None.

    Raises:
        DistillError: It is something else.
    """
    if value is None:
        return None
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(n, str) for n in found):
        raise DistillError(f'{where} must be a list of names, got {value!r}.')
    return tuple(found)


def check_stages(stages: Sequence[Stage], terms: Collection[str]) -> None:
    """Refuse stages that name terms that do not exist, and terms that are in no stage.

    Raises:
        DistillError: See above.
    """
    for i, stage in enumerate(stages):
        for name in stage.terms or ():
            if name not in terms:
                raise DistillError(f'stages[{i}].terms: there is no term {name!r}: {nearest(name, terms)}')
    for name in terms:
        if stages and all(s.terms is not None and name not in s.terms for s in stages):
            raise DistillError(f'term {name!r} is in no stage, so it would never be on; name it, or remove it.')


class Freezer:
    """Keeps parts of a model from training, from one iteration to the next, whatever trains it.

    Their gradients are 0 from the moment they are computed, so that clipping by norm and a mean over ranks see nothing
    of them, and are gone when the optimizer steps: it neither moves these parameters nor their momentum, and goes on
    with them as it left them. ``requires_grad`` stays, which DDP looks at once and for all. Normalisation runs in
    evaluation mode: its statistics are frozen too.

    Args:
        model: The student.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._frozen: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._handles: list[Any] = []
        self._quiet: list[nn.Module] = []

    def freeze(self, modules: Sequence[nn.Module]) -> None:
        """Freeze these parts, and nothing else from now on.

        Args:
            modules: They; with all that is in them.
        """
        if [id(m) for m in modules] == [id(m) for m in self._frozen]:
            return
        self.release()
        self._frozen = list(modules)
        self._parameters = parameters_of(modules)
        self._handles = [p.register_hook(_nothing) for p in self._parameters if p.requires_grad]

    def release(self) -> None:
        """Let everything train again."""
        for handle in self._handles:
            handle.remove()
        for module in self._quiet:
            module.train(self.model.training)
        self._frozen, self._parameters, self._handles, self._quiet = [], [], [], []

    def begin_iteration(self) -> None:
        """Frameworks put the whole model into training mode at the beginning of every epoch."""
        for part in self._frozen:
            for module in part.modules():
                if isinstance(module, _NormBase) and module.training:
                    module.eval()
                    self._quiet.append(module)

    def before_step(self, optimizer: Optimizer, *step: Any) -> None:
        """The optimizer is about to step."""
        for parameter in self._parameters:
            parameter.grad = None


def parameters_of(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Every parameter in some modules, once."""
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def rest_of(model: nn.Module, kept: Sequence[nn.Module]) -> list[nn.Module]:
    """The largest modules in a model that have nothing of some others in them; itself, where it has none of them."""
    inside = {id(m) for part in kept for m in part.modules()}

    def search(module: nn.Module) -> list[nn.Module]:
        if id(module) in inside:
            return []
        if not any(id(m) in inside for m in module.modules()):
            return [module]
        return [found for child in module.children() for found in search(child)]

    return search(model)


def _nothing(gradient: Tensor) -> Tensor:
    return torch.zeros_like(gradient)
