"""What configs on top of mmdet's or mmseg's have in common: each change is a line, ``_base_.x.y = ...``."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from kd_plugins.config_files import config_folder
from kd_plugins.errors import DistillError
from kd_plugins.mm.configs import load_config
from kd_plugins.mm.starter.page import code, layout, place, seed_line
from kd_plugins.teachers import find_source

#: Parts of a scheduler that are times.
TIMES = ('begin', 'end', 'T_max')


def add_options(parser: argparse.ArgumentParser, recipes: Sequence[str]) -> None:
    """The options that all students from a config share.

    Args:
        parser: It is added to.
        recipes: Of these the first that fits teaches where nothing is said.
    """
    parser.add_argument(
        '--student', required=True, metavar='CONFIG', help="config of the student: 'mmdet::path' or a file of your own"
    )
    add_teacher(parser, recipes)
    parser.add_argument('--epochs', type=int, help="length of an epoch-based schedule (default: the config's own)")
    parser.add_argument('--iters', type=int, help="length of an iteration-based schedule (default: the config's own)")
    parser.add_argument('-b', '--batch-size', type=int, help="images per process (default: the config's own)")
    parser.add_argument('--lr', type=float, help="learning rate (default: the config's own, for this batch)")
    parser.add_argument(
        '-j', '--workers', type=int, default=2, help='processes that read images (default: %(default)s)'
    )
    parser.add_argument(
        '--scratch', action='store_true', help='do not fetch the pretrained backbone that the config names'
    )


def add_teacher(parser: argparse.ArgumentParser, recipes: Sequence[str]) -> None:
    """Who teaches what, and where the config goes."""
    parser.add_argument(
        '--teacher', '--teacher-config', metavar='CONFIG', help='config of the teacher, or a checkpoint that tells its '
        'network (beside its config, or of timm); without, the config is that of a plain student',
    )  # fmt: skip
    parser.add_argument('--teacher-checkpoint', metavar='PTH', help='weights of the teacher')
    default = recipes[0] if len(recipes) == 1 else f'the first of {", ".join(recipes)} that fits'
    parser.add_argument('--kd', metavar='RECIPE', help=f'see kd-plugins recipes (default: {default})')
    parser.add_argument('--out', required=True, metavar='FILE.py', help='the config to write')
    parser.add_argument('--force', action='store_true', help='replace a file that exists')
    parser.add_argument('--seed', type=int, help='seed of every random generator')


def hook_of(args: argparse.Namespace, plain: Config) -> dict[str, Any] | None:
    """The hook that distils a plain config as the options say, the teacher's files found; None without a teacher.

    Raises:
        DistillError: Something is missing or misspelt.
    """
    from kd_plugins.mm.cli import add_distillation

    if not args.teacher:
        if args.teacher_checkpoint:
            raise DistillError('--teacher-checkpoint needs --teacher: the config of the teacher.')
        return None
    config = Config(dict(model=dict(plain.model), default_hooks={}))
    add_distillation(config, args.kd, args.teacher, args.teacher_checkpoint)
    hook = config.default_hooks['distill'].to_dict()
    hook['teacher'] = find_source(hook['teacher'])
    return hook


class Student:
    """The config that is built on.

    Args:
        args: See `add_options`.
        words: The command line, to say what the file was made by.
    """

    def __init__(self, args: argparse.Namespace, words: str) -> None:
        self.args, self.words = args, words
        self.config = load_config(args.student, '--student')
        for option, value in (('--batch-size', args.batch_size), ('--epochs', args.epochs), ('--iters', args.iters)):
            if value is not None and value < 1:
                raise DistillError(f'{option} must be at least 1, got {value}.')
        self.batch = args.batch_size or self.config.train_dataloader.get('batch_size', 2)

    def page(self, title: str, data: str, images: int, classes: int) -> str:
        """The whole config.

        Args:
            title: What it is, one line.
            data: Lines on the data.
            images: How many there are to train on.
            classes: How many there are.
        """
        return layout(f"""
# {title}
# Made by: {self.words}
# Train:    kd-plugins train THIS_FILE   (or the framework's own tools/train.py)
# Evaluate: kd-plugins test THIS_FILE CHECKPOINT
# A line _base_.x.y = ... changes that entry of the config below; what is not named stays as it is there.
{self._base()}
custom_imports = {code(self._imports())}

# ---------------------------------------------------------------- the data
{data}

# ---------------------------------------------------------------- the student
{self._model(classes)}

# ---------------------------------------------------------------- batches and schedule
{self._schedule(images)}

# ---------------------------------------------------------------- distillation
{self._distill()}
""")

    def _base(self) -> str:
        student = self.args.student
        if student.startswith('mmdet::'):
            return f'_base_ = {student!r}'
        if '::' in student:
            # MMEngine's own way installs another package under the OneDL distributions.
            return f"_base_ = __import__('kd_plugins').config({student!r})"
        folder = os.path.dirname(os.path.abspath(self.args.out))
        return f'_base_ = {Path(os.path.relpath(place(student, "--student"), folder)).as_posix()!r}'

    def _imports(self) -> dict[str, Any]:
        own = self.config.get('custom_imports') or {}
        names = own.get('imports') or []
        names = [names] if isinstance(names, str) else list(names)
        return dict(imports=[*(n for n in names if n != 'kd_plugins.mm'), 'kd_plugins.mm'], allow_failed_imports=False)

    def _model(self, classes: int) -> str:
        lines = ['# Every head that predicts classes.']
        lines += [f'_base_.model{path} = {code(value)}' for path, value in class_numbers(self.config.model, classes)]
        norms = [path for path, v in walk(self.config.model) if path.endswith('.type') and v == 'SyncBN']
        if norms and not torch.cuda.is_available():
            lines.append('# SyncBN runs on GPUs only; leave these lines out there.')
            lines += [f"_base_.model{path} = 'BN'" for path in norms]
        fetched = list(pretrained(self.config.model))
        if self.args.scratch:
            lines += ['# Nothing is fetched from the internet.', *(f'_base_.model{path} = None' for path in fetched)]
        elif fetched:
            lines.append(f'# The backbone starts from published weights ({", ".join(p.lstrip(".") for p in fetched)}).')
        known = published(self.args.student)
        lines.append(
            '# Weights to start from; heads of other classes start anew.\n'
            f'# load_from = {known or "work_dirs/my_student/epoch_100.pth"!r}'
        )
        return '\n'.join(lines)

    # ------------------------------------------------------------------ schedule
    def _schedule(self, images: int) -> str:
        config, args = self.config, self.args
        by_epoch = 'max_epochs' in config.train_cfg
        wrong, right = ('iters', 'epochs') if by_epoch else ('epochs', 'iters')
        if getattr(args, wrong):
            raise DistillError(f'The schedule of {args.student} counts {right}; write --{right} instead of --{wrong}.')
        key = 'max_epochs' if by_epoch else 'max_iters'
        old = config.train_cfg[key]
        length = getattr(args, right) or old
        ratio = length / old
        steps = max(1, images // self.batch) if by_epoch else 1
        lines = [
            f'_base_.train_dataloader.batch_size = {self.batch}  # of every process; less if the memory is full',
            f'_base_.train_dataloader.num_workers = _base_.val_dataloader.num_workers = {args.workers}',
            f'_base_.train_dataloader.persistent_workers = {args.workers > 0}',
            f'_base_.val_dataloader.persistent_workers = {args.workers > 0}',
            f'_base_.train_cfg.{key} = {length}  # the base: {old}',
        ]
        interval = config.train_cfg.get('val_interval', 1)
        lines.append(f'_base_.train_cfg.val_interval = {_scaled(interval, ratio)}')
        if config.train_cfg.get('dynamic_intervals'):
            moved = [(_scaled(begin, ratio), every) for begin, every in config.train_cfg.dynamic_intervals]
            lines.append(f'_base_.train_cfg.dynamic_intervals = {code(moved)}')
        rate, note = self._rate()
        lines.append(f'_base_.optim_wrapper.optimizer.lr = {rate!r}  # {note}')
        kept = rate / config.optim_wrapper.optimizer.lr
        changed = [scheduler(s, by_epoch, ratio, length, steps * length, kept) for s in _list(config.param_scheduler)]
        lines.append('# The schedulers of the base, as long as this run.')
        lines.append(f'_base_.param_scheduler = {code(changed)}')
        for path, value in walk(_list(config.get('custom_hooks') or [])):
            if path.endswith(('.switch_epoch', '.num_last_epochs')):
                lines.append(f'_base_.custom_hooks{path} = {_scaled(value, ratio)}')
        checkpoint = config.default_hooks.get('checkpoint') or {}
        if 'interval' in checkpoint:
            lines.append(f'_base_.default_hooks.checkpoint.interval = {_scaled(checkpoint.interval, ratio)}')
        if 'logger' in config.default_hooks and by_epoch:
            lines.append(f'_base_.default_hooks.logger.interval = {max(1, min(50, steps // 4))}')
        lines.append(seed_line(args.seed))
        return '\n'.join(lines)

    def _rate(self) -> tuple[float, str]:
        """The learning rate, and why."""
        own = self.config.optim_wrapper.optimizer.lr
        if self.args.lr:
            return self.args.lr, f'the base: {own}'
        # As OpenMMLab names its configs, 8xb32: several keep another number in auto_scale_lr.
        named = re.search(r'_(\d+)xb(\d+)', self.args.student)
        stated = (self.config.get('auto_scale_lr') or {}).get('base_batch_size')
        usual = int(named[1]) * int(named[2]) if named else stated
        if not usual or usual == self.batch:
            return own, 'that of the base'
        # Three digits, and no 0.00012500000000000003.
        return float(f'{own * self.batch / usual:.3g}'), f'the base: {own} for {usual} images at a time; try a few'

    def _distill(self) -> str:
        hook = hook_of(self.args, self.config)
        if hook is None:
            return f"""# A teacher: a bigger model that was trained on the same classes, and what it teaches.
# default_hooks = dict(distill=dict(
#     type='kd_plugins.DistillHook', recipe={self.args.kd!r},
#     teacher=dict(config='big.py', checkpoint='big.pth')))"""
        return f"""# The teacher, and what it teaches (kd-plugins recipes lists more). Classes are matched by name.
# --cfg-options default_hooks.distill=None trains the plain student, to compare with.
default_hooks = dict(distill={code(hook)})"""


def walk(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """Everything in a config with the text that comes after its name, ``'.bbox_head[0].num_classes'``."""
    yield path, value
    if isinstance(value, Mapping):
        for key, item in value.items():
            if str(key).isidentifier():
                yield from walk(item, f'{path}.{key}')
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from walk(item, f'{path}[{index}]')


def class_numbers(model: Mapping[str, Any], count: int) -> Iterator[tuple[str, Any]]:
    """What has to change in a model for another number of classes: path and new value.

    Raises:
        DistillError: Nothing in it is a number of classes.
    """
    found = {p: v for p, v in walk(model) if p.endswith(('.num_classes', '.num_things_classes')) and isinstance(v, int)}
    if not found:
        raise DistillError(
            '--student has no num_classes in its model, so it cannot be told how many classes there are.'
        )
    # An RPN says 1, stuff of a detector 0.
    old = max(found.values())
    for path, value in walk(model):
        if found.get(path) == old:
            yield path, count
        elif path.endswith('.class_weight') and isinstance(value, list) and len(value) in (old, old + 1):
            # The last of one more is that of no object.
            yield path, [1.0] * count + value[old:]


def pretrained(model: Mapping[str, Any]) -> Iterator[str]:
    """Where a model names weights that its initialisation fetches."""
    for path, value in walk(model):
        if path.endswith('.pretrained') and isinstance(value, str):
            yield path
        if path.endswith('.init_cfg') and isinstance(value, Mapping) and value.get('type') == 'Pretrained':
            yield path


def published(spec: str) -> str | None:
    """The address of the weights that a package publishes for one of its configs; None when it names none."""
    import yaml

    package, separator, name = spec.partition('::')
    if not separator:
        return None
    name = f'configs/{name if name.endswith(".py") else name + ".py"}'
    folder = config_folder(package) / Path(name).relative_to('configs').parent
    for file in sorted((*folder.glob('metafile.y*ml'), *folder.parent.glob('metafile.y*ml'))):
        content = yaml.safe_load(file.read_text(encoding='utf-8'))
        for model in content.get('Models') or () if isinstance(content, dict) else ():
            if model.get('Config') == name:
                return model.get('Weights')
    return None


def scheduler(
    given: Mapping[str, Any], by_epoch: bool, ratio: float, length: int, steps: int, rate: float
) -> dict[str, Any]:
    """A scheduler for a run of another length.

    Args:
        given: The base's.
        by_epoch: Whether the run counts epochs.
        ratio: New length over the old one.
        length: New length, in epochs or iterations.
        steps: New length in iterations.
        rate: New learning rate over the old one.
    """
    found = {k: v for k, v in given.items() if k != '_scope_'}
    if 'eta_min' in found:
        found['eta_min'] = float(f'{found["eta_min"] * rate:.3g}')
    if found.get('by_epoch', True) != by_epoch:
        # A warm-up of so many iterations, which is not to be most of a short run.
        if 'end' in found:
            found['end'] = found.get('begin', 0) + max(1, min(found['end'] - found.get('begin', 0), steps // 10))
        return found
    if 'milestones' in found:
        found['milestones'] = sorted({max(1, round(m * ratio)) for m in found['milestones']})
    begin = min(round(found.get('begin', 0) * ratio), length - 1)
    span = round((found['end'] if 'end' in found else length / ratio) * ratio) - begin
    changed = dict(begin=begin, end=begin + max(1, span), T_max=max(1, span))
    return {**found, **{k: v for k, v in changed.items() if k in found}}


def _scaled(value: int, ratio: float) -> int:
    return max(1, round(value * ratio))


def _list(value: Any) -> Sequence[Any]:
    return [value] if isinstance(value, Mapping) else value


def data_set(config: Config, loader: str, change: Callable[[str], str]) -> str:
    """A line that changes the data set of a loader inside whatever wraps it.

    Args:
        config: The base.
        loader: Its key.
        change: Makes the line of the path of the data set.

    Raises:
        DistillError: It joins several.
    """
    path, inner = f'{loader}.dataset', config[loader].dataset
    while isinstance(inner.get('dataset'), Mapping):
        path, inner = f'{path}.dataset', inner.dataset
    if 'datasets' in inner:
        raise DistillError(f'{loader} of --student joins several data sets; take a config that trains on one.')
    return change(f'_base_.{path}')
