"""Things that a term names by ``'kind'`` or ``dict(type='kind', **options)``, and that a user's file may add to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kd_plugins.errors import DistillError, in_words, nearest

_T = TypeVar('_T')


def register_in(kinds: dict[str, Callable[..., _T]], name: str) -> Callable[[type], type]:
    """Decorator that adds a class to ``kinds`` under a name."""

    def decorate(cls: type) -> type:
        kinds[name] = cls
        return cls

    return decorate


def build_kind(kinds: Mapping[str, Callable[..., _T]], value: Any, where: str) -> _T:
    """Build what a term names.

    Args:
        kinds: What there is, by name.
        value: A name, or ``dict(type=name, **options)``.
        where: What it is, for messages.

    Raises:
        DistillError: There is no such kind, or it does not take these options.
    """
    options = dict(value) if isinstance(value, Mapping) else {'type': value}
    kind = options.pop('type', None)
    if kind not in kinds:
        raise DistillError(f'{where} has no type {kind!r}: {nearest(kind, kinds)}')
    try:
        return kinds[kind](**options)
    except TypeError as error:
        raise DistillError(f'{where} ({kind}) does not take these options: {in_words(error)}.') from error
