"""``kd-plugins train`` and ``kd-plugins test``, for any MMEngine config."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import HOOKS, MODELS, RUNNERS
from mmengine.runner import Runner
from mmengine.utils import get_object_from_string

from kd_plugins import registry as ours
from kd_plugins.distiller.terms import loss_parameters
from kd_plugins.errors import DistillError, check_keys, nearest
from kd_plugins.mm.configs import load_config, merge_options, missing, remove_distillation
from kd_plugins.mm.imports import import_package
from kd_plugins.mm.recipes import read_python
from kd_plugins.mm.resume import ResumeGuard
from kd_plugins.mm.starter import images
from kd_plugins.recipes import TASKS, find_recipe
from kd_plugins.recipes.options import check_names, possible, read_words, recipe_list
from kd_plugins.teachers.sources import of_file
from kd_plugins.type_names import type_name


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f'kd-plugins {command}', description=description)
    training = command == 'train'
    parser.add_argument(
        'config', nargs='?' if training else None, help="config file, or 'mmdet::path/in/its/configs.py'"
    )
    parser.add_argument(
        '--work-dir',
        *(['--output'] if training else []),
        help='where logs and checkpoints go (default: work_dirs/<config name>)',
    )
    parser.add_argument(
        '--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none', help="'pytorch' under torchrun"
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override entries of the config'
    )
    parser.add_argument('--seed', type=int, help='seed of every random generator')
    # torch.distributed.launch passes it; torchrun sets the environment variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


#: Where the command line puts a distillation.
HOOK = 'default_hooks.distill.'


def _read_config(args: argparse.Namespace, *, tested: bool = False) -> Config:
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = load_config(args.config, 'config')
    config.launcher = args.launcher
    later = getattr(args, 'kd', None) is not None
    options = {k: v for k, v in (args.cfg_options or {}).items() if not (later and k.startswith(HOOK))}
    merge_options(config, options, tested=tested)
    if args.work_dir:
        config.work_dir = args.work_dir
    elif not config.get('work_dir'):
        config.work_dir = os.path.join('work_dirs', Path(args.config.split('::')[-1]).stem)
    if args.seed is not None:
        config.randomness = {**(config.get('randomness') or {}), 'seed': args.seed}
    return config


def _runner(config: Config) -> Runner:
    import_package(config.get('default_scope'))
    try:
        return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
    except KeyError as error:
        absent = missing(error, 'the config', config.get('default_scope'))
        if absent is None:
            raise
        raise absent from error


def train(argv: Sequence[str] | None = None) -> None:
    """Train any MMEngine config, plain or distilled.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Raises:
        DistillError: Something does not fit; nothing was trained.
    """
    parser = _parser('train', 'Train any MMEngine config, with or without knowledge distillation.')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT', help='resume (default: the latest)')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate by the batch size')
    kd = parser.add_argument_group('distillation', 'turn a plain config into a distilled one without editing it')
    kd.add_argument(
        '--kd',
        nargs='+',
        metavar='RECIPE',
        help='name (see kd-plugins recipes), or a .yaml or .py file with terms; several are done at once',
    )
    kd.add_argument(
        '--kd-options',
        nargs='+',
        action='extend',
        metavar='NAME=VALUE',
        help='changes to the recipe: weight=3 temperature=2 (every term that has it), TERM.weight=3 (one term), '
        'alpha=0.7, start=10, stop=280, teacher.KEY=VALUE; values are YAML',
    )
    kd.add_argument(
        '--teacher',
        metavar='CONFIG',
        help='config of the teacher, or the .pt of an Ultralytics model; a checkpoint that tells its network (of timm, '
        'or beside its config); for classifiers also timm::NAME, torchvision::NAME or an exported .pt2 / .torchscript',
    )
    kd.add_argument(
        '--teacher-checkpoint', metavar='PTH', help='weights of the teacher, where they stand in a file of their own'
    )
    start = parser.add_argument_group('without a config', "a model of timm on a folder of images, with timm's options")
    start.add_argument('--data', metavar='DIR', help='folder with train/<class>/ and val/<class>/')
    images.add_options(start)
    args = parser.parse_args(argv)
    starting = bool(args.data or args.model)
    if starting:
        images.begin(args, sys.argv[2:] if argv is None else argv)
    elif args.config is None:
        raise DistillError('kd-plugins train needs a config, or --model NAME --data DIR for a classifier of timm.')
    config = _read_config(args)
    if args.amp:
        _use_amp(config)
    if args.auto_scale_lr:
        if 'enable' not in (config.get('auto_scale_lr') or {}):
            raise DistillError(
                '--auto-scale-lr needs auto_scale_lr=dict(enable=..., base_batch_size=...) in the config.'
            )
        config.auto_scale_lr.enable = True
    if args.resume:
        config.resume = True
        config.load_from = None if args.resume == 'auto' else args.resume
    hooks = config.get('default_hooks') or {}
    on_purpose = 'distill' in hooks and hooks['distill'] is None
    if on_purpose:
        # What None does to MMEngine's own hooks; of others it asserts that they are none.
        remove_distillation(config)
    if args.kd_options and not args.kd:
        raise DistillError('--kd-options changes the recipe of --kd, which is missing; name one, e.g. --kd cwd.')
    given = {'--kd': args.kd, '--teacher': args.teacher, '--teacher-checkpoint': args.teacher_checkpoint}
    if of_file(str(args.teacher)) is not None:
        del given['--teacher-checkpoint']
    missing = [option for option, value in given.items() if not value]
    if not missing:
        add_distillation(config, args.kd, args.teacher, args.teacher_checkpoint, args.kd_options or ())
        options = args.cfg_options or {}
        config.merge_from_dict({k: v for k, v in options.items() if k.startswith(HOOK)})
    elif any(given.values()):
        raise DistillError(f'{", ".join(given)} go together; {" and ".join(missing)} is missing.')
    _check_types(config)
    if starting:
        images.end(args, config)
    runner = _runner(config)
    if config.get('resume') and (config.get('default_hooks') or {}).get('distill') is None:
        runner.register_hook(ResumeGuard(on_purpose))
    runner.train()


def test(argv: Sequence[str] | None = None) -> Mapping[str, float]:
    """Evaluate a checkpoint with a config, plain or distilled; no teacher is built or needed.

    A config without a test is measured on its validation.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Returns:
        The metrics.

    Raises:
        DistillError: The checkpoint is missing.
    """
    parser = _parser('test', 'Evaluate a checkpoint; a distilled config is evaluated as its plain student.')
    parser.add_argument('checkpoint', help='checkpoint of the student')
    parser.add_argument('--out', metavar='PKL', help='dump the predictions')
    args = parser.parse_args(argv)
    config = _read_config(args, tested=True)
    if not os.path.isfile(args.checkpoint):
        folder = Path(args.checkpoint).parent
        names = [p.as_posix() for p in folder.glob('*.pth')] if folder.is_dir() else []
        raise DistillError(f'checkpoint {args.checkpoint!r} does not exist; {nearest(args.checkpoint, names)}')
    config.load_from = args.checkpoint
    remove_distillation(config)
    runner = _runner(config)
    if args.out:
        if not args.out.endswith(('.pkl', '.pickle')):
            raise DistillError(f'--out must end in .pkl, got {args.out!r}.')
        from mmengine.evaluator import DumpResults

        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    return runner.test()


def _check_types(config: Config) -> None:
    """Name the right type where MMEngine only says that a wrong one is in no registry."""
    hook = (config.get('default_hooks') or {}).get('distill')
    for where, spec, registry, right in (
        ('default_hooks.distill', hook, HOOKS, 'kd_plugins.DistillHook'),
        ('model', config.model, MODELS, 'kd_plugins.Distilled'),
    ):
        name = spec.get('type') if isinstance(spec, Mapping) else None
        if not isinstance(name, str) or 'distil' not in name.lower():
            continue
        with registry.switch_scope_and_registry(config.get('default_scope', 'mmengine')) as scope:
            if scope.get(name) is None:
                raise DistillError(f'{where} has no type {name!r}; did you mean {right!r}?')
    # Not `to_dict`, which writes the classes of pure-Python configs as strings.
    _check_own(dict(config.items()), '')


def _check_own(value: Any, where: str) -> None:
    """Refuse misspelt names and options of ours, for which MMEngine has but a traceback."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_own(item, where)
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        # Terms find losses and adapters in another way, and say so themselves.
        if key != 'terms':
            _check_own(item, f'{where}.{key}' if where else str(key))
    name = value.get('type')
    own = _find_own(name, where)
    if own is None:
        return
    name = name if isinstance(name, str) else f'kd_plugins.{type_name(name)}'
    taken = inspect.signature(own).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        check_keys((k for k in value if k not in ('type', '_scope_')), taken, f'{where} ({name})')
    for key, parameter in taken.items():
        required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if required and key not in value:
            raise DistillError(f'{where} ({name}) needs {key!r}.')


def _find_own(name: Any, where: str) -> Callable[..., Any] | None:
    """What a ``type`` of ours builds; None for others'.

    Raises:
        DistillError: It would be one of ours, but there is none of that name.
    """
    registries = (ours.DATASETS, ours.HOOKS, ours.METRICS, ours.MODELS)
    known = {f'kd_plugins.{n}': c for registry in registries for n, c in registry.module_dict.items()}
    if not isinstance(name, str):
        return name if name in known.values() else None
    if not name.startswith('kd_plugins.'):
        return None
    # A whole path is what MMEngine dumps of a class.
    found = known.get(name) or get_object_from_string(name)
    if found is None:
        raise DistillError(f'{where}: there is no type {name!r}; {nearest(name, known)}')
    return found if found in known.values() else None


def _use_amp(config: Config) -> None:
    wrapper = config.get('optim_wrapper')
    if not isinstance(wrapper, dict):
        raise DistillError('--amp needs an optim_wrapper in the config.')
    kind = type_name(wrapper.get('type', 'OptimWrapper'))
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise DistillError(f'--amp can change an OptimWrapper only, this config uses {kind!r}.')
    wrapper['type'] = 'AmpOptimWrapper'
    wrapper.setdefault('loss_scale', 'dynamic')


def add_distillation(
    config: Config,
    recipe: str | Sequence[str],
    teacher: str,
    checkpoint: str | None = None,
    words: Sequence[str] = (),
) -> None:
    """Turn a plain config into a distilled one.

    Args:
        config: Changed in place.
        recipe: Name or file of a recipe, see `kd_plugins.recipes`; or several, with commas or in a list.
        teacher: The teacher's config, the ``.pt`` of an Ultralytics model, ``timm::name``, ``torchvision::name``, or an
            exported classifier (``.pt2``, ``.torchscript``).
        checkpoint: The teacher's weights; files of models have their own.
        words: Changes to the recipes, ``'weight=3'``, see `kd_plugins.recipes.options`.

    Raises:
        DistillError: The recipe is wrong or has not what is changed, or the config already distils.
    """
    if config.model.get('distill') is not None or (config.get('default_hooks') or {}).get('distill') is not None:
        raise DistillError(
            '--kd is for plain configs; this config already distils (model.distill or default_hooks.distill).'
        )
    # What a name stands for depends on the model, which the hook knows.
    found = [read_python(r) if find_recipe(r, '--kd').suffix == '.py' else r for r in recipe_list(recipe)]
    one = found[0] if len(found) == 1 else None
    options = one if isinstance(one, Mapping) else {'recipe': one or found}
    source = teacher_source(teacher, checkpoint)
    if words:
        options = {**options, 'options': read_words(words)}
        # What no task has need not wait for the model.
        changes = options['options']
        bodies = [{**body, 'teacher': source} for body in possible(found, TASKS, '--kd', changes)]
        # MMEngine's registries are not asked: the config's own imports are not done.
        check_names(bodies, changes, loss_parameters(), '--kd-options')
    hook = dict(type='kd_plugins.DistillHook', teacher=source, **options)
    config.default_hooks = {**(config.get('default_hooks') or {}), 'distill': hook}
    _import_ourselves(config)


def teacher_source(teacher: str, checkpoint: str | None) -> dict[str, Any]:
    """The ``teacher`` mapping of what the command line says, see `add_distillation`.

    Raises:
        DistillError: It names no model.
    """
    file = of_file(teacher)
    if file is not None and checkpoint:
        raise DistillError(
            f'--teacher-checkpoint belongs to the config or the name of a teacher; {teacher!r} holds weights itself.'
        )
    if file is not None:
        return file
    zoo, separator, name = teacher.partition('::')
    if separator and zoo in ('timm', 'torchvision'):
        return {zoo: name, 'checkpoint': checkpoint}
    if not separator and '/' not in teacher and not teacher.endswith('.py') and not os.path.exists(teacher):
        raise DistillError(
            f"--teacher {teacher!r} is no file; give a config ('x.py', 'mmdet::path'), or name a classifier as "
            f'timm::{teacher} or torchvision::{teacher}.'
        )
    return dict(config=teacher, checkpoint=checkpoint)


def _import_ourselves(config: Config) -> None:
    imports = config.get('custom_imports') or dict(imports=[], allow_failed_imports=False)
    names: list[str] = [imports['imports']] if isinstance(imports['imports'], str) else list(imports['imports'])
    if 'kd_plugins.mm' not in names:
        config.custom_imports = {**imports, 'imports': [*names, 'kd_plugins.mm']}


if __name__ == '__main__':
    sys.exit('python -m kd_plugins.mm.cli is no command; write kd-plugins train or python -m kd_plugins train.')
