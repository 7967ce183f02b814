"""A distillation term: which loss, between which taps, with which adapter and weight."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import kd_plugins.adapters as adapters
import kd_plugins.losses as losses
from kd_plugins.distiller.schedules import Constant, Schedule, build_schedule
from kd_plugins.distiller.taps import Tap
from kd_plugins.errors import DistillError, check_keys, nearest

TERM_KEYS = ('loss', 'student', 'teacher', 'adapter', 'weight', 'temperature')
CONSUMES = ('features', 'logits', 'predictions', 'segmentation')
AUTO_OPTIONS = ('norm', 'prefix_tokens')
PROJECTORS = ('LogitProjector', 'kd_plugins.LogitProjector', adapters.LogitProjector)
Resolver = Callable[[str], Callable[..., nn.Module] | None]


@dataclass
class Term:
    """One entry of ``terms``.

    Attributes:
        name: Its key; logged as ``loss_kd_<name>``.
        loss: The loss module. Its ``consumes`` says what it is given: ``'features'``, ``'logits'``,
            ``'predictions'`` or ``'segmentation'``.
        student: Tap in the student.
        teacher: Tap in the teacher.
        adapter: ``'auto'`` or ``dict(type='auto', **options)``, None (shapes must fit), a config ``dict(type=...)``,
            or a list of configs, one after the other. Losses on logits take none but `LogitProjector`.
        weight: Schedule of the weight.
        temperature: Schedule of the loss's temperature, or None to leave it as configured.
    """

    name: str
    loss: nn.Module
    student: Tap
    teacher: Tap
    adapter: Any
    weight: Schedule
    temperature: Schedule | None

    @property
    def consumes(self) -> str:
        """What the loss is given."""
        return getattr(self.loss, 'consumes', 'features')

    @property
    def automatic(self) -> Mapping[str, Any]:
        """Options of the automatic adapter; false where the term has another adapter, or none."""
        if self.adapter == 'auto':
            return {'norm': False}
        if isinstance(self.adapter, Mapping) and self.adapter.get('type') == 'auto':
            return {'norm': False, **{k: v for k, v in self.adapter.items() if k != 'type'}}
        return {}

    @property
    def projects(self) -> bool:
        """Whether the student's tap is a feature of which the adapter makes class logits."""
        return _is_projector(self.adapter)

    @property
    def always_zero(self) -> bool:
        """Whether the weight is 0 throughout the run."""
        return isinstance(self.weight, Constant) and self.weight.value == 0


def build_named(cfg: Any, package: Any, where: str, kind: str, resolve: Resolver | None = None) -> nn.Module:
    """Build ``dict(type='Name', **options)`` from a package, then from a framework's registry.

    Args:
        cfg: The config.
        package: Module whose ``__all__`` lists the names that resolve first.
        where: What it is, for error messages.
        kind: ``'loss'`` or ``'adapter'``.
        resolve: Looks a name up in the framework's registries; returns None when it is unknown.

    Raises:
        DistillError: No such name, unknown options or refused values.
    """
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise DistillError(f"{where} must be dict(type='...', ...), got {cfg!r}.")
    options = dict(cfg)
    name = options.pop('type')
    known = [n for n in package.__all__ if inspect.isclass(getattr(package, n))]
    if not isinstance(name, str):
        factory: Any = name
    else:
        short = name.split('.')[-1] if name.startswith('kd_plugins.') else name
        factory = getattr(package, short) if short in known else (resolve(name) if resolve else None)
    if factory is None:
        raise DistillError(f'{where}: there is no {kind} {name!r}; {nearest(name, known)}')
    try:
        accepted = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # pragma: no cover - builtins without a signature
        accepted = {}
    if accepted and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        check_keys(options, accepted, f'{where} ({getattr(factory, "__name__", name)})')
    try:
        return factory(**options)
    except DistillError as error:
        raise DistillError(f'{where}: {error}') from error
    except TypeError as error:
        raise DistillError(f'{where}: {getattr(factory, "__name__", name)} cannot be built: {error}.') from error


def build_terms(cfg: Any, resolve: Resolver | None = None) -> dict[str, Term]:
    """Read ``terms`` from a config.

    Args:
        cfg: Mapping of name to term.
        resolve: Looks up loss names that are not ours.

    Returns:
        The terms in order.

    Raises:
        DistillError: A term is misspelt, or there is none.
    """
    if isinstance(cfg, (list, tuple)):
        raise DistillError(
            'terms must be a dict, name=dict(loss=...), so that configs can inherit and override; got a list.'
        )
    if not isinstance(cfg, Mapping) or not {k: v for k, v in cfg.items() if v is not None}:
        raise DistillError(
            "terms is empty: nothing would be distilled; write terms=dict(logits=dict(loss=dict(type='YOLOLogitLoss'), "
            "student='bbox_head', teacher='bbox_head'))."
        )
    # `terms=dict(logits=None)` in a child config takes an inherited term out.
    return {name: _build_term(name, term, resolve) for name, term in cfg.items() if term is not None}


def _build_term(name: str, cfg: Any, resolve: Resolver | None) -> Term:
    where = f'term {name!r}'
    if not isinstance(name, str) or not name.isidentifier():
        raise DistillError(f'{where}: the name becomes the log key loss_kd_<name> and must be an identifier.')
    if not isinstance(cfg, Mapping):
        raise DistillError(f'{where} must be a dict, got {cfg!r}.')
    check_keys(cfg, TERM_KEYS, where)
    for key in ('loss', 'student', 'teacher'):
        if key not in cfg:
            raise DistillError(f"{where} needs 'loss', 'student' and 'teacher'; {key!r} is missing.")
    loss = build_named(cfg['loss'], losses, f'{where}: loss', 'loss', resolve)
    consumes = getattr(loss, 'consumes', 'features')
    if consumes == 'masks':
        raise DistillError(
            f'{where}: {type(loss).__name__} compares masks of instances, which only the Ultralytics side of this '
            'package computes (its option mask); for class logits per pixel use PixelwiseKLDivLoss.'
        )
    if consumes not in CONSUMES:
        raise DistillError(f'{where}: loss.consumes must be one of {", ".join(map(repr, CONSUMES))}, got {consumes!r}.')
    temperature = None
    if cfg.get('temperature') is not None:
        if not hasattr(loss, 'temperature'):
            raise DistillError(f'{where}: {type(loss).__name__} has no temperature; remove the option.')
        temperature = build_schedule(cfg['temperature'], f'{where}: temperature', 0.0, strict=True)
    adapter = cfg.get('adapter', 'auto')
    _check_adapter(adapter, where)
    if _is_projector(adapter) and consumes != 'logits':
        raise DistillError(
            f'{where}: LogitProjector makes class logits, and {type(loss).__name__} compares {consumes}; take a loss '
            "on logits, e.g. loss=dict(type='KLDivLoss'), or another adapter."
        )
    if adapter not in ('auto', None) and consumes != 'features' and not _is_projector(adapter):
        what = 'class logits of pixels' if consumes == 'segmentation' else consumes
        raise DistillError(f'{where}: {type(loss).__name__} compares {what}, which take no adapter; remove it.')
    return Term(
        name=name,
        loss=loss,
        student=Tap.parse(cfg['student'], f'{where}: student'),
        teacher=Tap.parse(cfg['teacher'], f'{where}: teacher'),
        adapter=adapter,
        weight=build_schedule(cfg.get('weight', 1.0), f'{where}: weight'),
        temperature=temperature,
    )


def _is_projector(adapter: Any) -> bool:
    return isinstance(adapter, Mapping) and adapter.get('type') in PROJECTORS


def _check_adapter(adapter: Any, where: str) -> None:
    if isinstance(adapter, Mapping) and adapter.get('type') == 'auto':
        check_keys({k: v for k, v in adapter.items() if k != 'type'}, AUTO_OPTIONS, f'{where}: adapter (auto)')
        if not isinstance(adapter.get('norm', False), bool):
            raise DistillError(f'{where}: adapter.norm must be True or False, got {adapter["norm"]!r}.')
        _check_prefix(adapter.get('prefix_tokens'), where)
        return
    parts = adapter if isinstance(adapter, (list, tuple)) else [adapter]
    if adapter in ('auto', None) or (parts and all(isinstance(p, Mapping) for p in parts)):
        return
    raise DistillError(f"{where}: adapter must be 'auto', None, dict(type=...) or a list of such, got {adapter!r}.")


def _check_prefix(value: Any, where: str) -> None:
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or any(
        v is not None and (isinstance(v, bool) or not isinstance(v, int) or v < 0) for v in sides
    ):
        raise DistillError(
            f'{where}: adapter.prefix_tokens must be a whole number, or two (student, teacher), got {value!r}.'
        )


def build_adapter(term: Term, cfg: Any, where: str, resolve: Resolver | None = None) -> nn.Module:
    """Build an adapter that a term spells out; a list of configs becomes a chain."""
    if isinstance(cfg, (list, tuple)):
        chain = (build_named(c, adapters, f'{where}[{i}]', 'adapter', resolve) for i, c in enumerate(cfg))
        return adapters.AdapterChain(*chain)
    return build_named(cfg, adapters, where, 'adapter', resolve)
