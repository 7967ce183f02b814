"""Several recipes at once, and changes to what they say: one mechanism for both zoos.

A distillation is made of one or several recipes, which are merged, and of *options*, which are applied last:

.. code-block:: bash

    kd-plugins train my.py --kd pixel_kl cwd --kd-options weight=3 logits_cwd.temperature=2 alpha=0.7 ...
    yolo-kd train ... kd=cwd,pkd kd_weight=3 kd_neck_pkd.weight=10 kd_stop=280

``alpha``, ``start``, ``stop`` and ``pseudo_labels`` are those of the run, ``teacher.KEY`` is an entry of the teacher,
``TERM.KEY`` one of a term or of its loss, and any other name is that of every term which has it. Neither torch nor a
framework is imported here: what a loss takes is asked of whoever knows it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kd_plugins.errors import DistillError, nearest
from kd_plugins.recipes import KEYS, Loader, check_body, is_name, load_recipe

RUN_KEYS = tuple(key for key in KEYS if key != 'terms')
#: Entries of a term that mean the same in every term.
TERM_KEYS = ('weight', 'temperature', 'samples', 'adapter', 'teacher_adapter', 'student')
#: What only one term can be told: bare, they mean something else or nothing.
ONE_TERM_KEYS = ('loss', 'teacher', 'start', 'stop')
#: Names of the options that a loss takes, by its config; None where it is not known.
Parameters = Callable[[Mapping[str, Any]], Collection[str] | None]


# ---------------------------------------------------------------------- words of a command line
def read_words(
    words: Iterable[str], where: str = '--kd-options', read: Callable[[str, str], Any] | None = None
) -> dict[str, Any]:
    """``['weight=3', 'logits.loss.beta=2']`` as nested values, each read as YAML.

    Args:
        words: Of a command line.
        where: The option they came from, for error messages.
        read: ``read(text, where)`` reads a value. Default: `read_value`.

    Raises:
        DistillError: A word is no ``name=value``, its value no YAML, or two words contradict each other.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, value = split_word(word, where)
        parts = name.split('.')
        inside = found
        for part in parts[:-1]:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise DistillError(f'{where}: {word!r} goes into {part!r}, which has a value already; write it once.')
        if parts[-1] in inside:
            raise DistillError(
                f'{where}: {name!r} is given twice; several values are for kd-plugins compare, which tries them all.'
            )
        inside[parts[-1]] = (read or read_value)(value, f'{where}: {name}')
    return found


def split_word(word: str, where: str = '--kd-options') -> tuple[str, str]:
    """Name and value of ``name=value``.

    Raises:
        DistillError: It is none.
    """
    name, equals, value = word.partition('=')
    if not equals or not value or not all(name.split('.')):
        raise DistillError(
            f'{where}: {word!r} is no name=value; write e.g. weight=3, alpha=0.7, stop=280 or neck.weight=3.'
        )
    return name, value


def read_value(text: str, where: str) -> Any:
    """A value of a command line, read as YAML.

    Raises:
        DistillError: It is none.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise DistillError(
            f'{where}: {text!r} is not valid YAML; write e.g. 3, [car, bus] or "{{type: linear, start: 1, end: 0}}", '
            'in quotes, so that the shell passes it on in one piece.'
        ) from error


def combinations(groups: Iterable[Sequence[str]], where: str = '--kd-options') -> list[list[str]]:
    """Every combination of the values that are to be tried.

    Args:
        groups: Words, one list for each time that the option is given: ``weight=1,3,10`` is three values, and so is the
            name three times. Lists are not combined with each other: each says combinations of its own.
        where: The option they came from, for error messages.

    Returns:
        For each combination its words; ``[[]]`` where nothing is given.

    Raises:
        DistillError: A word is no ``name=value``.
    """
    found: list[list[str]] = []
    for words in groups:
        values: dict[str, list[str]] = {}
        for word in words:
            name, value = split_word(word, where)
            values.setdefault(name, []).extend(split_values(value))
        for chosen in itertools.product(*values.values()):
            combination = [f'{name}={value}' for name, value in zip(values, chosen, strict=True)]
            if combination not in found:
                found.append(combination)
    return found or [[]]


def split_values(text: str) -> list[str]:
    """``'1,3'`` at its commas, but for those inside brackets, braces and quotes."""
    parts, depth, quote = [''], 0, ''
    for letter in text:
        if quote:
            quote = '' if letter == quote else quote
        elif letter in '"\'':
            quote = letter
        depth += (not quote) * ((letter in '[{(') - (letter in ']})'))
        if letter == ',' and not quote and depth == 0:
            parts.append('')
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()] or [text]


def split_recipes(text: str) -> list[str]:
    """The recipes of ``'pixel_kl,cwd'``; a file whose name has a comma is one."""
    return [text] if ',' not in text or Path(text).is_file() else [t.strip() for t in text.split(',')]


# ---------------------------------------------------------------------- several recipes
def recipe_list(recipe: Any) -> list[Any]:
    """Recipes as they may be written: a name or file, several with commas or in a list, a body as a mapping."""
    entries = recipe if isinstance(recipe, (list, tuple)) else [recipe]
    return [one for e in entries for one in (split_recipes(e) if isinstance(e, str) else [e])]


def load_recipes(recipe: Any, task: str, where: str = 'recipe', given: Collection[str] = ()) -> dict[str, Any]:
    """What one or several recipes say of a task, merged.

    Args:
        recipe: See `recipe_list`.
        task: ``'detection'``, ``'segmentation'`` or ``'classification'``.
        where: The option it came from, for error messages.
        given: Keys among `KEYS` that the run is told itself, about which the recipes may disagree.

    Returns:
        See `load_recipe`. Of two terms of one name the second is called ``NAME_RECIPE``; one that both recipes have
        alike is taken once.

    Raises:
        DistillError: See `load_recipe`; or two recipes want another ``alpha``, ``start``, ``stop`` or
            ``pseudo_labels``.
    """
    merged: dict[str, Any] = {'terms': {}}
    owners: dict[str, str] = {}
    seen: list[tuple[str, Any]] = []
    entries = recipe_list(recipe)
    if not entries:
        raise DistillError(f'{where} is empty; name a recipe.')
    for entry in entries:
        if isinstance(entry, Mapping):
            check_body(entry, where)
            name, body = 'own', dict(entry)
        else:
            name, body = _short(entry), load_recipe(entry, task, where)
        for key, value in body.items():
            if key == 'terms':
                continue
            if key in merged and merged[key] != value and key not in given:
                raise DistillError(
                    f'{where}: {owners[key]!r} has {key}={merged[key]!r} and {name!r} has {value!r}; say which: '
                    f'{key}={value!r} (--kd-options {key}=..., kd_{key}=...).'
                )
            merged[key] = value
            owners.setdefault(key, name)
        for term, cfg in body['terms'].items():
            if (term, cfg) in seen:
                continue
            seen.append((term, cfg))
            merged['terms'][_free(term, name, merged['terms'])] = cfg
    return merged


def possible(recipe: Any, tasks: Iterable[str], where: str, given: Collection[str] = ()) -> list[dict[str, Any]]:
    """What recipes may stand for while the task of the student is not known, see `load_recipes`.

    Args:
        recipe: See `recipe_list`.
        tasks: Those that may be meant.
        where: The option it came from, for error messages.
        given: See `load_recipes`.

    Returns:
        A body for each task that the recipes are for.

    Raises:
        DistillError: They are for none.
    """
    found, first = [], None
    for task in tasks:
        try:
            found.append(load_recipes(recipe, task, where, given))
        except DistillError as error:
            first = first or error
    if not found and first is not None:
        raise first
    return found


def _short(recipe: str | os.PathLike[str]) -> str:
    return os.fspath(recipe) if is_name(recipe) else Path(recipe).stem


def _free(term: str, recipe: str, taken: Collection[str]) -> str:
    """A name that no term has yet, and that is an identifier, as log keys need it."""
    if term not in taken:
        return term
    base = f'{term}_{re.sub(r"[^0-9A-Za-z_]", "_", recipe)}'
    numbered = (f'{base}_{i}' for i in itertools.count(2))
    return next(n for n in itertools.chain([base], numbered) if n not in taken)


def complete(terms: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The terms of recipes with a run's own ones beside them.

    One that says no ``loss.type`` changes that of the same name; any other takes its place.

    Args:
        terms: Of the recipes.
        own: Written beside them; None takes a term out.

    Raises:
        DistillError: These are no mapping.
    """
    if not isinstance(own, Mapping):
        raise DistillError(f'terms must be a dict, name=dict(loss=...), also beside a recipe; got {own!r}.')
    found = dict(terms)
    for name, term in own.items():
        whole = not isinstance(term, Mapping) or (isinstance(term.get('loss'), Mapping) and 'type' in term['loss'])
        found[name] = term if whole or not isinstance(found.get(name), Mapping) else _deep(found[name], term)
    return found


def _deep(base: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in changes.items():
        inside = isinstance(value, Mapping) and isinstance(found.get(key), Mapping) and 'type' not in value
        found[key] = _deep(found[key], value) if inside else value
    return found


# ---------------------------------------------------------------------- options
def apply_options(
    body: Mapping[str, Any], options: Mapping[str, Any], parameters: Parameters, where: str = 'options'
) -> dict[str, Any]:
    """A distillation with options applied.

    Args:
        body: ``terms``, the other `KEYS`, and perhaps ``teacher``; it is left as it is.
        options: See the module; nested, as `read_words` makes them.
        parameters: What a loss takes.
        where: The option they came from, for error messages.

    Raises:
        DistillError: There is nothing of a name; the nearest is named.
    """
    found = dict(body)
    terms = {name: _copy(term) for name, term in body['terms'].items()}
    for key, value in options.items():
        if key in RUN_KEYS:
            found[key] = value
        elif key == 'teacher':
            found['teacher'] = _taught(found.get('teacher'), value, where)
        elif key in terms:
            terms[key] = _changed_term(key, terms[key], value, parameters, where)
        else:
            having = [n for n, t in terms.items() if t is not None and _has(t, key, parameters)]
            if not having:
                raise DistillError(
                    f'{where}: nothing has an option {key!r}; {nearest(key, option_names(terms, parameters))}'
                )
            for name in having:
                _set(terms[name], key, value)
    found['terms'] = terms
    return found


def option_names(terms: Mapping[str, Any], parameters: Parameters) -> list[str]:
    """What may be written for some terms, for messages."""
    there = [t for t in terms.values() if t is not None]
    short = [k for t in there for k in (*TERM_KEYS, *(_loss_options(t, parameters) or ())) if _has(t, k, parameters)]
    return sorted({*RUN_KEYS, *short, *terms})


def check_names(
    bodies: Iterable[Mapping[str, Any]], options: Mapping[str, Any], parameters: Parameters, where: str = 'options'
) -> None:
    """Refuse options that none of several distillations has, of which one will be the run's.

    Args:
        bodies: One for each task that may be meant.
        options: See `apply_options`.
        parameters: See `apply_options`.
        where: See `apply_options`.

    Raises:
        DistillError: Every one of them refuses the options.
    """
    first = None
    for body in bodies:
        try:
            apply_options(body, options, parameters, where)
            return
        except DistillError as error:
            first = first or error
    if first is not None:
        raise first


def _copy(term: Any) -> Any:
    if isinstance(term, Mapping):
        return {k: _copy(v) for k, v in term.items()}
    return [_copy(v) for v in term] if isinstance(term, (list, tuple)) else term


def _taught(teacher: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DistillError(
            f'{where}: teacher={value!r} is no entry of the teacher; write teacher.KEY=..., and of the place where a '
            'term is taught TERM.teacher=....'
        )
    if not isinstance(teacher, Mapping):
        raise DistillError(f'{where}: teacher.{next(iter(value))} needs one teacher, and there are several.')
    return _deep(teacher, value)


def _changed_term(name: str, term: Any, value: Any, parameters: Parameters, where: str) -> Any:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not isinstance(term, Mapping):
        raise DistillError(f'{where}: {name!r} is a term; write e.g. {name}.weight={value}, or {name}=null without it.')
    term = dict(term)
    for key, inner in value.items():
        if key in ONE_TERM_KEYS:
            term[key] = _deep(term[key], inner) if key == 'loss' and isinstance(inner, Mapping) else inner
        elif _has(term, key, parameters):
            _set(term, key, inner)
        else:
            known = [*ONE_TERM_KEYS, *TERM_KEYS, *(_loss_options(term, parameters) or ())]
            raise DistillError(f'{where}: term {name!r} has no option {key!r}; {nearest(key, known)}')
    return term


def _loss_options(term: Any, parameters: Parameters) -> Collection[str] | None:
    loss = term.get('loss') if isinstance(term, Mapping) else None
    return parameters(loss) if isinstance(loss, Mapping) else ()


def _has(term: Mapping[str, Any], key: str, parameters: Parameters) -> bool:
    taken = _loss_options(term, parameters)
    if taken is None:
        return True
    # A loss without a temperature is not given one.
    return key in taken or (key in TERM_KEYS and key != 'temperature')


def _set(term: dict[str, Any], key: str, value: Any) -> None:
    if key in TERM_KEYS:
        old = term.get(key)
        merge = isinstance(value, Mapping) and isinstance(old, Mapping) and 'type' not in value
        term[key] = _deep(old, value) if merge else value
    else:
        term['loss'] = {**term['loss'], key: value}
