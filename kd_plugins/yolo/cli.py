"""``yolo-kd``: the ``yolo`` command plus ``kd_*`` options.

.. code-block:: bash

    yolo-kd train model=yolo11n.yaml data=coco.yaml kd_teacher=yolo11x.pt kd_cls=1 kd_box=1
    yolo-kd train model=yolo11n.yaml data=coco.yaml kd=cwd kd_teacher=yolo11x.pt
    yolo-kd train resume model=runs/detect/train/weights/last.pt

The ``kd_*`` options are taken out and become a `DistillCallback`; everything else goes to Ultralytics' own entry
point. The callback is in Ultralytics' public default callbacks while that runs.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from kd_plugins import __version__, autoload
from kd_plugins.distiller.terms import loss_parameters
from kd_plugins.errors import DistillError, nearest
from kd_plugins.on_import import VARIABLE
from kd_plugins.recipes.options import check_names, complete, possible, read_value, read_words
from kd_plugins.yolo.callback import EVENTS, DistillCallback, check_installed, check_version
from kd_plugins.yolo.options import HOW, DistillOptions
from kd_plugins.yolo.recipe import read_recipe, recipe_of_run

VERSION = ('version', '--version')
HELP = ('help', '-h', '-help', '--help', '--h')
SWITCH = {'enable': autoload.enable, 'disable': autoload.disable, 'status': autoload.status}
RECIPE = 'kd'
TUNE = 'tune'


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command.

    Args:
        arguments: Words after the command. Default: those of this process.

    Returns:
        Exit status: 0, or 2 after a wrong distillation option, which is reported in one sentence.
    """
    try:
        run(list(sys.argv[1:] if arguments is None else arguments))
    except DistillError as error:
        print(f'yolo-kd: {error}', file=sys.stderr)
        return 2
    return 0


def run(arguments: list[str]) -> None:
    """Do what the words say.

    Raises:
        DistillError: A ``kd_*`` option is wrong, or a distilled run cannot be resumed as it was.
    """
    # `yolo solutions help` and the like are other pages.
    if not arguments or arguments[0] in HELP or ('train' in arguments and any(a in HELP for a in arguments)):
        print(help_text())
        return
    if arguments[0] in VERSION:
        print(version_text())
        return
    if arguments[0] in SWITCH:
        if len(arguments) > 1:
            raise DistillError(f'{arguments[0]} takes no further words, got {" ".join(arguments[1:])!r}.')
        print(SWITCH[arguments[0]]())
        return
    check_installed()
    rest, given = split(arguments)
    options = choose(overrides_of(rest), given)
    if options is None:
        hand_over(rest)
        return
    check_version()
    with prefixed(given):
        callback = DistillCallback(options)
    if TUNE in rest:
        tune(callback, overrides_of(rest))
        return
    with by_default(callback):
        hand_over(rest)


def tune(callback: DistillCallback, overrides: dict[str, Any]) -> None:
    """Tune with distillation; Ultralytics' own command has no such mode.

    Raises:
        DistillError: There is no model, or the distillation would not run.
    """
    from ultralytics import YOLO

    options = {k: v for k, v in overrides.items() if k != 'mode'}
    if not options.get('model'):
        raise DistillError(f'{TUNE} needs the student: yolo-kd {TUNE} model=yolo11n.yaml data=coco.yaml iterations=30.')
    model = YOLO(options.pop('model'), task=options.pop('task', None))
    callback.register(model)
    model.tune(**options)


def choose(overrides: dict[str, Any], given: dict[str, Any]) -> DistillOptions | None:
    """The distillation of this command, None for a plain one.

    Args:
        overrides: What Ultralytics is told (:func:`overrides_of`).
        given: The ``kd_*`` options without their prefix, and ``kd``.

    Raises:
        DistillError: The options are wrong or meaningless here.
    """
    given = dict(given)
    if overrides.get('mode') not in ('train', TUNE):
        if given:
            raise DistillError(
                f'kd options are for training, and the mode is {overrides.get("mode")!r}: write yolo-kd train ... '
                'or yolo-kd tune ...; a distilled model is validated, used and exported like any other.'
            )
        return None
    recipe = given.pop(RECIPE, None)
    resume = overrides.get('resume')
    if recipe is None and resume and overrides['mode'] == 'train':
        recipe = recipe_of_run(str(resume if isinstance(resume, (str, os.PathLike)) else overrides.get('model')))
    if recipe is None and not given:
        return None
    values = {**(read_recipe(str(recipe)) if recipe is not None else {}), **given}
    if recipe is not None:
        _check_changes(values)
    if values.get('teacher') is None:
        raise DistillError('kd_teacher is missing, the file of the teacher: e.g. kd_teacher=yolo11x.pt.')
    with prefixed(given):
        return DistillOptions(**values)


def _check_changes(values: Mapping[str, Any]) -> None:
    """Refuse changes to a recipe that it has for no task: which task it is, is known when the model is built."""
    changes = values.get('options')
    if not isinstance(changes, Mapping) or not values.get('recipe') or values.get('imports'):
        return
    short = {n: {'loss': {}} for n in HOW if values.get(n) is not None}
    bodies = [
        {**body, 'terms': {**short, **complete(body['terms'], values.get('terms') or {})}, 'teacher': {}}
        for body in possible(values['recipe'], ('detection', 'classification'), RECIPE, {*values, *changes})
    ]
    check_names(bodies, changes, loss_parameters(), f'{RECIPE} options')


# ---------------------------------------------------------------------- words
def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the ``kd_*`` words out.

    Returns:
        The other words, and the options without ``kd_`` with parsed values; ``kd`` itself keeps its name.

    Raises:
        DistillError: An option is unknown, has no value, or one that cannot be read.
    """
    if not any(_is_ours(a) for a in arguments):
        return list(arguments), {}
    from ultralytics.cfg import merge_equals_args

    try:
        words = merge_equals_args(list(arguments))
    except SyntaxError as error:
        raise DistillError(str(error)) from error
    rest: list[str] = []
    given: dict[str, Any] = {}
    changes: list[str] = []
    recipe = any(w.lstrip('-').startswith(f'{RECIPE}=') for w in words)
    for word in words:
        if not _is_ours(word):
            rest.append(word)
        elif _is_change(word, recipe):
            changes.append(word.lstrip('-').removesuffix(',').removeprefix(f'{RECIPE}_'))
        else:
            key, value = _option(word)
            given[key] = value
    if changes:
        more = read_words(changes, f'{RECIPE} options', _read_change)
        given['options'] = {**(given.get('options') or {}), **more}
    return rest, given


def parse_value(text: str) -> Any:
    """Read a value as the ``yolo`` command does (None, True, numbers, literals), and dicts and lists more freely.

    ``dict(type='linear', start=1.0, end=0.0)`` and ``{type: linear, start: 1.0, end: 0.0}`` are the same, and so are
    ``['car', 'bus']`` and ``[car, bus]``. What is none of this is a string.

    Raises:
        DistillError: It begins like a dict or list and cannot be read.
    """
    if text.lower() in ('none', 'true', 'false'):
        return {'none': None, 'true': True, 'false': False}[text.lower()]
    try:
        return _literal(ast.parse(text, mode='eval').body)
    except (ValueError, SyntaxError):
        pass
    if not text.startswith(('[', '{', 'dict(')):
        return text
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):
        raise DistillError(
            f'{text!r} cannot be read: write e.g. "[car, bus]" or "dict(type=\'linear\', start=1.0, end=0.0)", in '
            'quotes, so that the shell passes it on in one piece.'
        )
    return value


def overrides_of(words: Sequence[str]) -> dict[str, Any]:
    """What Ultralytics' entry point will make of the words, as far as it matters here.

    Whatever is wrong with them is left to it.
    """
    from ultralytics.cfg import DEFAULT_CFG, MODES, merge_equals_args, parse_key_value_pair
    from ultralytics.utils import YAML
    from ultralytics.utils.checks import check_yaml

    overrides: dict[str, Any] = {}
    with contextlib.suppress(SyntaxError):
        for word in merge_equals_args(list(words)):
            word = word.removeprefix('--').removesuffix(',')
            if '=' in word:
                # A missing value or file.
                with contextlib.suppress(Exception):
                    key, value = parse_key_value_pair(word)
                    if key == 'cfg' and value is not None:
                        overrides = {**YAML.load(check_yaml(value)), **overrides}
                    else:
                        overrides[key] = value
            elif word in MODES or word == TUNE:
                overrides['mode'] = word
            elif word == 'resume':
                overrides['resume'] = True
    overrides.setdefault('mode', DEFAULT_CFG.mode or 'predict')
    return overrides


def _is_ours(word: str) -> bool:
    return bool(re.match(r'kd', word.lstrip('-'), re.IGNORECASE))


def _is_change(word: str, recipe: bool) -> bool:
    """Whether a word changes a recipe, or an entry of the teacher, and is no option of its own."""
    name = word.lstrip('-').partition('=')[0].strip()
    if not name.startswith(f'{RECIPE}_') or '=' not in word:
        return False
    name = name.removeprefix(f'{RECIPE}_')
    return name.startswith('teacher.') or (recipe and name not in DistillOptions.names())


def _read_change(text: str, where: str) -> Any:
    # dict(type='linear', ...) as in the other options.
    return parse_value(text) if text.startswith('dict(') else read_value(text, where)


def _option(word: str) -> tuple[str, Any]:
    key, equals, value = word.lstrip('-').removesuffix(',').partition('=')
    key, value = key.strip(), value.strip()
    fields = {f'{RECIPE}_{f.name}': f for f in dataclasses.fields(DistillOptions)}
    if key not in fields and key != RECIPE:
        raise DistillError(f'there is no option {key!r}: {nearest(key, [*fields, RECIPE])} (yolo-kd help lists them)')
    if not equals and key in fields and isinstance(fields[key].default, bool):
        return fields[key].name, True  # as `yolo show` means show=True
    if not value:
        raise DistillError(f'{key} needs a value, e.g. {key}={"kd.yaml" if key == RECIPE else _example(fields[key])}')
    if key == RECIPE:
        return key, value
    try:
        return fields[key].name, parse_value(value)
    except DistillError as error:
        raise DistillError(f'{key}={error}') from error


def _example(field: dataclasses.Field) -> Any:
    return 'yolo11x.pt' if field.name == 'teacher' else 1.0 if field.default is None else field.default


def _literal(node: ast.expr) -> Any:
    """A literal in which ``dict(a=1)`` is allowed."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        if all(k.arg is not None for k in node.keywords):
            return {k.arg: _literal(k.value) for k in node.keywords}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(e) for e in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values, strict=True)}
    return ast.literal_eval(node)


@contextlib.contextmanager
def prefixed(given: dict[str, Any]) -> Iterator[None]:
    """Name an option in an error as the user wrote it."""
    try:
        yield
    except DistillError as error:
        text = str(error)
        first = re.match(r'\w+', text)
        raise DistillError(f'kd_{text}' if first and first.group() in given else text) from error


# ---------------------------------------------------------------------- Ultralytics
@contextlib.contextmanager
def by_default(callback: DistillCallback) -> Iterator[None]:
    """Have every model that Ultralytics builds in the meantime come with (a copy of) the callback."""
    from ultralytics.utils.callbacks import default_callbacks

    added = [(default_callbacks.setdefault(event, []), getattr(callback, event)) for event in EVENTS]
    for handlers, handler in added:
        handlers.append(handler)
    try:
        yield
    finally:
        for handlers, handler in added:
            handlers.remove(handler)


def hand_over(words: Sequence[str]) -> None:
    """Run Ultralytics' own command with these words."""
    import ultralytics.cfg

    # It reads the list that was `sys.argv` when it was imported. Its name decides, among other things, whether
    # `predict` saves its pictures.
    lists = [sys.argv] if ultralytics.cfg.ARGV is sys.argv else [sys.argv, ultralytics.cfg.ARGV]
    before = [list(v) for v in lists]
    for v in lists:
        v[:] = [os.path.join(os.path.dirname(v[0] if v else ''), 'yolo'), *words]
    try:
        ultralytics.cfg.entrypoint()
    finally:
        for v, old in zip(lists, before, strict=True):
            v[:] = old


# ---------------------------------------------------------------------- help
def help_text() -> str:
    """What ``yolo-kd help`` prints, made from the documentation of `DistillOptions`."""
    lines = [
        "yolo-kd: Ultralytics' yolo command with knowledge distillation.",
        '',
        '  yolo-kd train model=yolo11n.yaml data=coco.yaml kd_teacher=yolo11x.pt kd_cls=1 kd_box=1',
        '  yolo-kd train model=yolo11n.yaml data=coco.yaml kd=kd.yaml kd_cls=0.5    # a file and a change to it',
        '  yolo-kd train ... kd=cwd,binary_kl kd_teacher=yolo11x.pt kd_weight=3 kd_neck.weight=10 kd_stop=280',
        '  yolo-kd tune model=yolo11n.yaml data=coco.yaml iterations=30 kd=kd.yaml    # every training distils',
        '  yolo-kd train resume model=runs/detect/train/weights/last.pt             # with the kd.yaml of that run',
        f'  yolo-kd status | enable | disable    # let an unmodified yolo train read a recipe from {VARIABLE}',
        '',
        'Without kd options it is the yolo command (yolo help). The options:',
        '',
        *_entry(
            RECIPE,
            'A recipe by name (kd-plugins recipes lists them), or a YAML file with any of the options below without '
            'kd_. They override it. Several with commas. Beside it kd_weight=3 (and any other option of a term or of '
            'its loss) changes every term that has it, kd_TERM.weight=3 one term, kd_teacher.KEY=... the teacher.',
            'None',
        ),
    ]
    docs = option_docs()
    for field in dataclasses.fields(DistillOptions):
        default = 'required' if field.default is dataclasses.MISSING else repr(field.default)
        lines += _entry(f'{RECIPE}_{field.name}', docs.get(field.name, ''), default)
    return '\n'.join(lines)


def version_text() -> str:
    """Ours, and Ultralytics' as ``yolo version`` has it where it is installed."""
    try:
        theirs = metadata.version('ultralytics')
    except metadata.PackageNotFoundError:
        theirs = 'not installed'
    return f'kd_plugins {__version__}\nultralytics {theirs}'


def option_docs() -> dict[str, str]:
    """The sentences about each option in the docstring of `DistillOptions`."""
    section = re.search(r'^Attributes:\n(.*?)^\S', inspect.getdoc(DistillOptions), re.DOTALL | re.MULTILINE).group(1)
    docs: dict[str, str] = {}
    name = ''
    for line in textwrap.dedent(section).splitlines():
        head = re.match(r'(\w+): (.*)', line)
        if head:
            name, docs[head.group(1)] = head.groups()
        elif line.strip():
            docs[name] += ' ' + line.strip()
    return {k: v.replace('``', '') for k, v in docs.items()}


def _entry(name: str, text: str, default: str) -> list[str]:
    body = textwrap.wrap(text, 88, initial_indent=' ' * 6, subsequent_indent=' ' * 6)
    return [f'  {name}  [{default}]', *body]


if __name__ == '__main__':
    sys.exit(main())
