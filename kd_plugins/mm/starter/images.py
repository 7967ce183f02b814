"""A config for a folder of images and a model of timm."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from kd_plugins.classification.datasets import ImageFolder
from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import DistillError
from kd_plugins.mm.starter.page import code, free_path, in_comment, layout, place, seed_line
from kd_plugins.teachers import create_network, data_config, find_source
from kd_plugins.teachers.network import DataConfig, check_name
from kd_plugins.teachers.recognition import timm_order

#: What timm takes for folders of training and of validation images.
TRAIN, VAL = ('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation')
#: Where none is asked for, the first that fits; this one needs logits alone, so it suits any two classifiers.
RECIPES = ('kl',)


@dataclass(frozen=True)
class Folder:
    """An image folder.

    Attributes:
        root: Its absolute path.
        train: Name of the folder of training images.
        val: Name of the folder of validation images.
        classes: Class names in order.
        count: Training images.
    """

    root: str
    train: str
    val: str
    classes: tuple[str, ...]
    count: int


def add_options(parser: Any) -> None:
    """The options with which timm's own script trains; of the parser, or of a group in it."""
    parser.add_argument('--model', metavar='NAME', help='student: the name of a timm model, e.g. resnet18')
    parser.add_argument('--epochs', type=int, default=100, help='default: %(default)s')
    parser.add_argument('-b', '--batch-size', type=int, default=128, help='default: %(default)s')
    parser.add_argument('--lr', type=float, default=1e-3, help='of AdamW (default: %(default)s)')
    parser.add_argument(
        '--input-size', '--img-size', type=int, nargs='+', metavar='N', help='pixels, or height width, or channels '
        "height width (default: the model's own, mostly 224)",
    )  # fmt: skip
    parser.add_argument(
        '-j', '--workers', type=int, default=4, help='processes that read images (default: %(default)s)'
    )
    parser.add_argument('--pretrained', action='store_true', help="start from timm's weights (from the internet)")
    parser.add_argument('--initial-checkpoint', metavar='FILE', help='start from weights of your own')


def begin(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Put the plain student's config in the place of one that the command line does not name.

    Args:
        args: Options of ``kd-plugins train``; ``config``, ``work_dir`` and ``kd`` are set.
        words: The command line.

    Raises:
        DistillError: Options are missing, or the folder holds no data set.
    """
    if args.config is not None:
        raise DistillError(f'--data and --model are for training without a config; leave them out, or {args.config!r}.')
    missing = [option for option, value in (('--model', args.model), ('--data', args.data)) if not value]
    if missing:
        raise DistillError(f'--model and --data go together; {missing[0]} is missing.')
    args.work_dir = args.work_dir or os.path.join('work_dirs', file_name(args.model))
    args.folder, args.words = look(args.data), list(words)
    args.kd = args.kd or (RECIPES[0] if args.teacher else None)
    plain = Config.fromstring(text(args, args.folder), '.py')
    args.config = Config(dict(plain.items()), cfg_text=plain.text, filename=f'{file_name(args.model)}.py')


def end(args: argparse.Namespace, config: Config) -> None:
    """Write the config of a run that `begin` began, teacher included, into its work folder.

    Not where MMEngine's own copy goes, which has no comments.

    Args:
        args: The options.
        config: As it will be run; its teacher is written as it was found.

    Raises:
        DistillError: The teacher is missing, or its file does not tell what it is.
    """
    hook = (config.get('default_hooks') or {}).get('distill')
    if hook is not None:
        hook['teacher'] = find_source(hook['teacher'])
        hook['teacher'].update(order_of(hook['teacher'], args.folder))
    if int(os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0'))):
        return  # another process writes it
    command = shlex.join(['kd-plugins', 'train', *args.words])
    written = text(args, args.folder, None if hook is None else hook.to_dict(), command)
    path = free_path(Path(config.work_dir, 'configs', f'{file_name(args.model)}.py'), written)
    print(f'The config of this run, to go on from: kd-plugins train {path}')


def file_name(model: str) -> str:
    """The name of a model as that of a file."""
    return model.split('/')[-1].replace('.', '_').replace(':', '_')


def look(data: str) -> Folder:
    """What an image folder holds.

    Raises:
        DistillError: No split, or no images.
    """
    root = place(data, '--data')
    if not os.path.isdir(root):
        raise DistillError(f'--data {root!r} must be a folder with train/<class>/ and val/<class>/.')
    inside = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    train = next((name for name in TRAIN if name in inside), None)
    val = next((name for name in VAL if name in inside), None)
    if train is None or val is None:
        lacks = ' and '.join(n for n, found in (('train/', train), ('val/', val)) if found is None)
        held = f'it holds {in_comment(inside)}' if inside else 'it holds no folders'
        raise DistillError(
            f'--data {root!r} has no {lacks} ({held}); make {root}/train/<class>/ and {root}/val/<class>/, and move '
            'about every fifth image of each class to val.'
        )
    images = ImageFolder(root, train)
    classes = images.metainfo['classes']
    ImageFolder(root, val, classes=classes)
    return Folder(Path(root).as_posix(), train, val, classes, len(images))


def order_of(teacher: Mapping[str, Any], folder: Folder) -> dict[str, Any]:
    """Names of a teacher's classes where timm numbered the same folders in another order: '2' before '10'."""
    names = timm_order(folder.classes)
    unnamed = 'timm' in teacher and not teacher.get('classes') and teacher.get('num_classes') == len(names)
    return dict(classes=names) if unnamed and names != list(folder.classes) else {}


def _size(args: argparse.Namespace) -> tuple[int, DataConfig]:
    """Channels, and how images are brought to the student."""
    given = args.input_size or []
    if len(given) > 3:
        raise DistillError(f'--input-size is N, H W or C H W, got {" ".join(map(str, given))}.')
    channels = given[0] if len(given) == 3 else 3
    sides = tuple(given[-2:]) * (2 if len(given) == 1 else 1) or None
    check_name(args.model, '--model')
    with untouched_rng(), torch.device('meta'):
        net = create_network(args.model, in_chans=channels, input_size=sides, where='--model')
    return channels, data_config(net)


def text(args: argparse.Namespace, folder: Folder, distill: Mapping[str, Any] | None = None, command: str = '') -> str:
    """The config.

    Args:
        args: See `add_options`; also ``amp`` and ``seed``.
        folder: The data.
        distill: The hook; None: a plain student.
        command: What the config was made by.

    Raises:
        DistillError: The model is unknown, or a number cannot be right.
    """
    for option, value in (('--epochs', args.epochs), ('--batch-size', args.batch_size)):
        if value < 1:
            raise DistillError(f'{option} must be at least 1, got {value}.')
    channels, data = _size(args)
    height, width = data.input_size
    warmup = min(5, args.epochs // 10)
    number = len(folder.classes)
    student: dict[str, Any] = dict(num_classes=number, input_size=height if height == width else (height, width))
    student |= dict(in_chans=channels) if channels != 3 else {}
    student |= dict(pretrained=True) if args.pretrained else {}
    student |= (
        dict(checkpoint=place(args.initial_checkpoint, '--initial-checkpoint')) if args.initial_checkpoint else {}
    )
    images = f"type='kd_plugins.ImageFolder', root=data_root{f', in_chans={channels}' if channels != 3 else ''}"
    # Elsewhere the data set knows them: all splits number alike.
    names = '' if folder.train == 'train' else f', classes={code(folder.classes)}'
    wrapper = "type='AmpOptimWrapper', loss_scale='dynamic'" if args.amp else "type='OptimWrapper'"
    linear = (
        f"dict(type='LinearLR', start_factor=0.01, begin=0, end={warmup}, convert_to_iter_based=True),"
        if warmup
        else '# no warm-up in so short a run'
    )
    return layout(f"""
# {args.model} on the images in {folder.root}: {folder.count} to train on, {number} classes
# ({in_comment(folder.classes)}).
{f'# Made by: {command}' if command else ''}
# Train:    kd-plugins train THIS_FILE
# Evaluate: kd-plugins test THIS_FILE CHECKPOINT

# ---------------------------------------------------------------- what is changed most often
data_root = {folder.root!r}
model_name = {args.model!r}  # any model of timm
batch_size = {args.batch_size}  # of every process; less if the memory is full
epochs = {args.epochs}
lr = {args.lr!r}  # try a few; of AdamW, which other models want from 3e-4 to 3e-3
workers = {args.workers}  # processes that read images

default_scope = 'mmengine'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)

# ---------------------------------------------------------------- the student
model = dict(
    type='kd_plugins.TimmClassifier', model=model_name, {', '.join(f'{k}={code(v)}' for k, v in student.items())},
    # checkpoint='weights.pth',  # start from these (a classifier of other classes starts anew), or pretrained=True
    # drop_path_rate=0.1,  # what timm's model takes goes here as well
    label_smoothing=0.0,
    # mixup=dict(mixup_alpha=0.2, cutmix_alpha=1.0),  # worth trying in long runs
)

# ---------------------------------------------------------------- the images
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=workers,
    persistent_workers=workers > 0,
    drop_last={folder.count >= args.batch_size},
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        {images}, split={folder.train!r}{names},
        transform=dict(
            input_size={code(student['input_size'])}, training=True, interpolation={data.interpolation!r},
            # The smallest part of an image that is cut out: raise it where objects fill the image or images are small.
            scale=({0.08 if min(height, width) > 64 else 0.4}, 1.0),
            hflip=0.5,  # 0.0 where left and right differ, as in letters
            # auto_augment='rand-m9-mstd0.5-inc1',  # stronger, for long runs
        )))
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=workers,
    persistent_workers=workers > 0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        {images}, split={folder.val!r}{names},
        # crop_pct: which part of an image the centre crop keeps.
        transform=dict(input_size={code(student['input_size'])}, interpolation={data.interpolation!r},
                       crop_pct={data.crop_pct if min(height, width) > 64 else 1.0!r})))
test_dataloader = val_dataloader
val_evaluator = dict(type='kd_plugins.Accuracy', topk={(1, 5) if number > 5 else (1,)})
test_evaluator = val_evaluator

# ---------------------------------------------------------------- the schedule
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    {wrapper},
    # Or dict(type='SGD', lr=lr, momentum=0.9, weight_decay=1e-4), with ten to a hundred times that lr.
    optimizer=dict(type='AdamW', lr=lr, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    {linear}
    dict(type='CosineAnnealingLR', eta_min={args.lr / 100!r}, begin={warmup}, end=epochs, convert_to_iter_based=True),
]
{seed_line(args.seed)}

# ---------------------------------------------------------------- logs, checkpoints, distillation
default_hooks = dict(
    logger=dict(type='LoggerHook', interval={max(1, min(50, math.ceil(folder.count / args.batch_size / 4)))}),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2, save_best='accuracy/top1', rule='greater'),
    {_distill(distill)})
""")


def _distill(distill: Mapping[str, Any] | None) -> str:
    if distill is None:
        return """# A teacher: train a bigger model first (the same file with another model_name), then
    # distill=dict(type='kd_plugins.DistillHook', recipe='kl',
    #              teacher=dict(timm='resnet50', checkpoint='work_dirs/teacher/epoch_100.pth')),
"""
    return f"""# The teacher, and what it teaches: recipes are listed by kd-plugins recipes --task classification.
    # None instead of dict(...) trains the plain student, to compare with.
    distill={code(distill)},
"""
