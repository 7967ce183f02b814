"""A distillation term: which loss, between which taps, with which adapter and weight, and when."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from torch import nn

import kd_plugins.losses as losses
from kd_plugins.distiller.combining import Combination, build_combination
from kd_plugins.distiller.ratio import Ratio, build_weight
from kd_plugins.distiller.schedules import Constant, Schedule, Window, build_window, is_zero
from kd_plugins.distiller.stages import names_in
from kd_plugins.distiller.taps import ALL, Tap
from kd_plugins.distiller.temperature import build_temperature
from kd_plugins.distiller.weighting import Weighting, build_weighting
from kd_plugins.errors import DistillError, check_keys, in_words, nearest
from kd_plugins.losses.base import CONSUMES, Declaration, declaration_of
from kd_plugins.predictions import Form, form_named, forms
from kd_plugins.type_names import type_name

TERM_KEYS = (
    'loss',
    'student',
    'teacher',
    'adapter',
    'teacher_adapter',
    'weight',
    'temperature',
    'start',
    'stop',
    'samples',
    'combine',
    'freeze',
)
AUTO_OPTIONS = ('norm', 'prefix_tokens')
#: Finds what builds a module, by name; None where the name is unknown.
Lookup = Callable[[str], Callable[..., nn.Module] | None]


@dataclass(frozen=True)
class Resolver:
    """Finds losses and adapters that are not ours.

    Args:
        modules: The user's own.
        more: Asked for names that are in none of them.
    """

    modules: tuple[ModuleType, ...] = ()
    more: Lookup | None = None

    def __call__(self, name: str) -> Callable[..., nn.Module] | None:
        """What builds the module of this name, None if it is unknown."""
        found = self.own(name)
        return self.more(name) if found is None and self.more is not None else found

    def own(self, name: str) -> Callable[..., nn.Module] | None:
        """The same in the user's modules alone; ``'Name'`` or ``'module.Name'``."""
        short = name.rpartition('.')[2]
        for module in self.modules:
            if short in vars(module) and name in (short, f'{module.__name__}.{short}'):
                return vars(module)[short]
        return None

    def names(self) -> list[str]:
        """What the user's modules define, to be suggested for misspelt names; not what they import."""
        return [
            name
            for module in self.modules
            for name, value in vars(module).items()
            if inspect.isclass(value)
            and issubclass(value, nn.Module)
            and value.__module__.partition('.')[0] == module.__name__.partition('.')[0]
        ]


@dataclass
class Term:
    """One entry of ``terms``.

    Attributes:
        name: Its key; logged as ``loss_kd_<name>``.
        loss: The loss module.
        declared: What the loss says of itself.
        student: Tap in the student.
        teacher: Tap in the teacher; its ``owner`` says in which one. Of several teachers, in the first.
        adapter: ``'auto'`` or ``dict(type='auto', **options)``, None (shapes must fit), a config ``dict(type=...)``,
            or a list of these, one after the other. Losses on logits take none but `LogitProjector`.
        teacher_adapter: The same for the teacher's side, without parameters to train; None: as it comes. The student
            is brought to what it makes.
        weight: Schedule of the weight.
        temperature: Schedule of the loss's temperature, or None to leave it as configured.
        window: Where in the run it is on, within the window of the run.
        samples: How much each image counts, or None: all alike.
        ratio: What finds the weight in the run, which is then multiplied by the schedule; None: the schedule is all.
        others: Taps in the teachers besides the first.
        combine: What is made of several teachers; None where there is one.
        freeze: Parts of the student that do not train while it is on, see `kd_plugins.distiller.stages.Stage`.
    """

    name: str
    loss: nn.Module
    student: Tap
    teacher: Tap
    adapter: Any
    weight: Schedule
    temperature: Schedule | None
    declared: Declaration = field(default_factory=Declaration)
    teacher_adapter: Any = None
    window: Window = field(default_factory=Window)
    samples: Weighting | None = None
    ratio: Ratio | None = None
    others: tuple[Tap, ...] = ()
    combine: Combination | None = None
    freeze: tuple[str, ...] = ()

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The taps in all of its teachers."""
        return (self.teacher, *self.others)

    @property
    def each(self) -> list[Term]:
        """The term as it would be for each of its teachers alone."""
        if not self.others:
            return [self]
        return [replace(self, teacher=tap, others=(), combine=None) for tap in self.taps]

    @property
    def teacher_text(self) -> str:
        """Where the teacher's side comes from, in words."""
        return ' + '.join(map(str, self.taps)) + ('' if self.combine is None else f' ({self.combine})')

    @property
    def weight_text(self) -> str:
        """The weight in words."""
        if self.ratio is None:
            return str(self.weight)
        return str(self.ratio) + ('' if isinstance(self.weight, Constant) else f', times {self.weight}')

    @property
    def consumes(self) -> str:
        """What the loss is given."""
        return self.declared.consumes

    @property
    def wanted(self) -> type[Form] | None:
        """The form that the loss asks for by name; None where it takes features or logits."""
        return None if self.consumes in CONSUMES else form_named(self.consumes)

    @property
    def automatic(self) -> Mapping[str, Any]:
        """Options of the automatic adapter; false where the term has another adapter, or none."""
        return next(filter(None, map(automatic, _parts(self.adapter))), {})

    @property
    def prefixes(self) -> tuple[int | None, int | None]:
        """Tokens in front of those of the patches, of student and teacher, where the term says so."""
        value = self.automatic.get('prefix_tokens')
        return (value[0], value[1]) if isinstance(value, (tuple, list)) else (value, value)

    @property
    def projects(self) -> bool:
        """Whether the student's tap is a feature of which the adapter makes class logits."""
        return _is_projector(self.adapter)

    @property
    def always_zero(self) -> bool:
        """Whether the weight is 0 throughout the run."""
        return is_zero(self.weight)


def automatic(adapter: Any) -> Mapping[str, Any]:
    """Options of ``'auto'`` or ``dict(type='auto', **options)``; false for any other adapter."""
    if adapter == 'auto':
        return {'norm': False}
    if isinstance(adapter, Mapping) and adapter.get('type') == 'auto':
        return {'norm': False, **{k: v for k, v in adapter.items() if k != 'type'}}
    return {}


def _parts(adapter: Any) -> Sequence[Any]:
    return adapter if isinstance(adapter, (list, tuple)) else (adapter,)


def resolver_of(imports: Any, more: Lookup | None = None) -> Resolver:
    """Finds losses and adapters of a user's own modules.

    Args:
        imports: Names of modules, ``['my_package.losses']``; importing them may also register forms, readers, schedules
            and the like.
        more: Asked for names that are in none of them.

    Raises:
        DistillError: A module cannot be imported.
    """
    names = [imports] if isinstance(imports, str) else imports or ()
    if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise DistillError(f"imports must be a list of module names, e.g. ['my_package.losses'], got {imports!r}.")
    found = []
    for name in names:
        try:
            found.append(importlib.import_module(name))
        except Exception as error:
            raise DistillError(f'imports: {name!r} cannot be imported ({in_words(error)}).') from error
    return Resolver(tuple(found), more)


def build_named(cfg: Any, package: Any, where: str, kind: str, resolve: Resolver | None = None) -> nn.Module:
    """Build ``dict(type='Name', **options)`` from a package, then from a framework's registry.

    Args:
        cfg: The config.
        package: Module whose ``__all__`` lists the names that resolve first.
        where: What it is, for error messages.
        kind: ``'loss'`` or ``'adapter'``.
        resolve: Finds what is not in the package. Default: nothing.

    Raises:
        DistillError: No such name, one that means two things, unknown options or refused values.
    """
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise DistillError(f"{where} must be dict(type='...', ...), got {cfg!r}.")
    options = dict(cfg)
    name = options.pop('type')
    known = [n for n in package.__all__ if inspect.isclass(getattr(package, n))]
    resolve = Resolver() if resolve is None else resolve
    if not isinstance(name, str):
        factory: Any = name
    else:
        short = name.split('.')[-1] if name.startswith('kd_plugins.') else name
        factory = getattr(package, short) if short in known else resolve(name)
        own = resolve.own(name) if short in known else None
        if own not in (None, factory):
            raise DistillError(
                f"{where}: {name!r} is a {kind} of kd_plugins and of {own.__module__!r}; write 'kd_plugins.{name}' or "
                f"'{own.__module__}.{name}'."
            )
    if factory is None:
        raise DistillError(f'{where}: there is no {kind} {name!r}; {nearest(name, [*known, *resolve.names()])}')
    accepted: Mapping[str, inspect.Parameter]
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


def loss_parameters(resolve: Resolver | None = None) -> Callable[[Mapping[str, Any]], Collection[str] | None]:
    """Asks for the names of the options that a loss takes, by its config ``dict(type=...)``.

    Args:
        resolve: Finds losses that are not ours.

    Returns:
        A function; it returns None for a loss that is not known or takes whatever it is given.
    """
    resolve = Resolver() if resolve is None else resolve

    def names(cfg: Mapping[str, Any]) -> Collection[str] | None:
        kind = cfg.get('type')
        short = str(kind).removeprefix('kd_plugins.')
        factory = (
            getattr(losses, short) if short in losses.__all__ else resolve(kind) if isinstance(kind, str) else kind
        )
        try:
            taken = inspect.signature(factory).parameters  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None
        return None if any(p.kind is p.VAR_KEYWORD for p in taken.values()) else list(taken)

    return names


def build_terms(cfg: Any, resolve: Resolver | None = None) -> dict[str, Term]:
    """Read ``terms`` from a config.

    Args:
        cfg: Mapping of name to term.
        resolve: Finds losses that are not ours.

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
            "student='head', teacher='head'))."
        )
    # `terms=dict(logits=None)` in a child config takes an inherited term out.
    return {name: _build_term(name, term, resolve) for name, term in cfg.items() if term is not None}


def images_of(terms: Iterable[Term]) -> int:
    """How many images a check must be given for every term to say something, where the run has so many."""
    return max((max(t.declared.images, 1 if t.samples is None else 2) for t in terms), default=1)


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
    declared = declaration_of(loss)
    consumes, known = declared.consumes, (*CONSUMES, *(f.name for f in forms()))
    if consumes not in known:
        raise DistillError(f'{where}: loss.consumes must be one of {", ".join(map(repr, known))}, got {consumes!r}.')
    temperature = None
    if cfg.get('temperature') is not None:
        if not hasattr(loss, 'temperature'):
            raise DistillError(f'{where}: {type(loss).__name__} has no temperature; remove the option.')
        temperature = build_temperature(cfg['temperature'], f'{where}: temperature')
    adapter = cfg.get('adapter', 'auto')
    _check_adapter(adapter, where)
    if _is_projector(adapter) and consumes != 'logits':
        raise DistillError(
            f'{where}: LogitProjector makes class logits, and {type(loss).__name__} compares {consumes}; take a loss '
            "on logits, e.g. loss=dict(type='KLDivLoss'), or another adapter."
        )
    if adapter not in ('auto', None) and consumes != 'features' and not _is_projector(adapter):
        what = consumes if consumes in CONSUMES else f'whole {form_named(consumes).head} heads'
        raise DistillError(f'{where}: {type(loss).__name__} compares {what}, which take no adapter; remove it.')
    teacher_adapter = cfg.get('teacher_adapter')
    if teacher_adapter is not None:
        _check_adapter(teacher_adapter, where, 'teacher_adapter')
        if consumes != 'features':
            raise DistillError(
                f"{where}: teacher_adapter brings the teacher's features to a form, e.g. dict(type='ChannelNorm'); "
                f'got {teacher_adapter!r} for a loss on {consumes}.'
            )
    student = Tap.parse(cfg['student'], f'{where}: student')
    if student.owner:
        raise DistillError(f'{where}: there is one student; write student={str(student).partition(":")[2]!r}.')
    weight, ratio = build_weight(cfg.get('weight', 1.0), f'{where}: weight')
    taps = _teachers(cfg['teacher'], where)
    several = len(taps) > 1 or taps[0].owner == ALL
    combine = build_combination(cfg.get('combine', 'mean'), f'{where}: combine') if several else None
    if combine is None and cfg.get('combine') is not None:
        raise DistillError(
            f"{where}: combine is for several teachers; write teacher=['big:head', 'small:head'], or '*:head'."
        )
    if combine is not None and (consumes == 'features' or _is_projector(adapter)):
        raise DistillError(
            f'{where}: several teachers are combined by what they predict, and {type(loss).__name__} compares '
            "features here; write one term for each of them, e.g. teacher='big:neck'."
        )
    return Term(
        name=name,
        loss=loss,
        student=student,
        teacher=taps[0],
        adapter=adapter,
        weight=weight,
        temperature=temperature,
        declared=declared,
        teacher_adapter=teacher_adapter,
        window=build_window(cfg.get('start'), cfg.get('stop'), f'{where}: '),
        samples=build_weighting(cfg.get('samples'), f'{where}: samples'),
        ratio=ratio,
        others=taps[1:],
        combine=combine,
        freeze=names_in(cfg.get('freeze'), f'{where}: freeze') or (),
    )


def _teachers(value: Any, where: str) -> tuple[Tap, ...]:
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    taps = tuple(Tap.parse(one, f'{where}: teacher') for one in given)
    if not taps or len(set(taps)) < len(taps):
        raise DistillError(f"{where}: teacher={value!r} must name each teacher once, e.g. ['big:head', 'small:head'].")
    return taps


def _is_projector(adapter: Any) -> bool:
    return isinstance(adapter, Mapping) and type_name(adapter.get('type')) == 'LogitProjector'


def _check_adapter(adapter: Any, where: str, key: str = 'adapter') -> None:
    parts = _parts(adapter)
    if adapter is not None and not (parts and all(p == 'auto' or isinstance(p, Mapping) for p in parts)):
        raise DistillError(f"{where}: {key} must be 'auto', None, dict(type=...) or a list of such, got {adapter!r}.")
    for part in parts:
        if not isinstance(part, str) and (options := dict(automatic(part))):
            check_keys(options, AUTO_OPTIONS, f'{where}: {key} (auto)')
            if not isinstance(options['norm'], bool):
                raise DistillError(f'{where}: {key}.norm must be True or False, got {options["norm"]!r}.')
            _check_prefix(options.get('prefix_tokens'), where)


def _check_prefix(value: Any, where: str) -> None:
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or any(
        v is not None and (isinstance(v, bool) or not isinstance(v, int) or v < 0) for v in sides
    ):
        raise DistillError(
            f'{where}: adapter.prefix_tokens must be a whole number, or two (student, teacher), got {value!r}.'
        )
