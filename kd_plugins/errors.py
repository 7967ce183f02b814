"""One clear sentence for a wrong input, with the nearest valid choices."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping


class DistillError(ValueError):
    """A distillation that cannot run as written; the message says what to write instead."""


def nearest(value: object, choices: Iterable[object], count: int = 3) -> str:
    """A clause naming the valid choices nearest to a wrong value, for the end of a sentence.

    Args:
        value: What was given.
        choices: What would have been valid.
        count: How many near misses to name.

    Returns:
        ``"did you mean 'a' or 'b'?"`` when something is close, otherwise ``"choose from: 'a', 'b', ..."``.
    """
    names = sorted({str(c) for c in choices})
    if not names:
        return 'there is nothing to choose from.'
    close = difflib.get_close_matches(str(value), names, count, 0.6)
    if close:
        return 'did you mean ' + ' or '.join(repr(c) for c in close) + '?'
    shown: list[str] = []
    room = 300
    for name in names[:20]:
        room -= len(repr(name)) + 2
        if shown and room < 60:
            break
        shown.append(repr(name))
    return f'choose from: {", ".join(shown)}{", ..." if len(names) > len(shown) else "."}'


def in_words(error: Exception) -> str:
    """An exception of somebody else's code as a clause: its kind and the first line of its text."""
    lines = str(error).strip().splitlines() or ['no details']
    return f'{type(error).__name__}: {lines[0][:200].rstrip(".:")}'


def shown(value: object) -> str:
    """A wrong value for a sentence: as it was written where that is short, else its kind (a network, many weights)."""
    if isinstance(value, (str, os.PathLike)):
        return repr(os.fspath(value))
    text = '' if isinstance(value, Mapping) and len(value) > 8 else repr(value)
    return text if text and len(text) <= 120 and '\n' not in text else f'an object of type {type(value).__name__}'


def check_keys(given: Iterable[str], allowed: Iterable[str], where: str) -> None:
    """Refuse unknown keys of a config mapping.

    Args:
        given: Keys that were written.
        allowed: Keys that exist.
        where: What the mapping is, for the message, e.g. ``"term 'logits'"``.

    Raises:
        DistillError: A key is unknown; the nearest valid one is named.
    """
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            raise DistillError(f'{where} has no option {key!r}: {nearest(key, allowed)}')
