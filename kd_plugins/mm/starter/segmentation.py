"""A config for a segmentor of mmseg and folders of images and label maps."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from mmengine.config import Config
from PIL import Image

from kd_plugins.errors import DistillError
from kd_plugins.mm.starter.based import Student, data_set, walk
from kd_plugins.mm.starter.page import code, colours, common_root, in_comment, place

#: Where none is asked for, the first that fits: class maps taught best, else features.
RECIPES = ('cwd', 'pkd')
#: Label maps that are read to see which classes there are.
READ = 100
#: mmseg's number of pixels that are of no class.
IGNORED = 255
#: What images and label maps are resized and cut to.
SIZES = ('scale', 'img_scale', 'crop_size')


class Maps(NamedTuple):
    """A folder of images with its folder of label maps.

    Attributes:
        images: Absolute.
        maps: Absolute.
        count: How many pairs.
        suffixes: What the names of images and of label maps end in; before, they are equal.
        size: ``(width, height)`` of the first image.
        values: Which numbers the label maps hold, sorted.
    """

    images: str
    maps: str
    count: int
    suffixes: tuple[str, str]
    size: tuple[int, int]
    values: tuple[int, ...]


def read(images: str, maps: str, option: str) -> Maps:
    """Look at the files.

    Raises:
        DistillError: Images and label maps do not belong together, or these are pictures.
    """
    images, maps = place(images, option), place(maps, option)
    names, labels = (sorted(_files(folder, option)) for folder in (images, maps))
    first = [os.path.splitext(found[0])[0] for found in (names, labels)]
    stem = os.path.commonprefix(first).rstrip('._-')  # noqa: RUF071 (of names, not of folders)
    suffixes = names[0][len(stem) :], labels[0][len(stem) :]
    partners = set(labels)
    # Names as a_leftImg8bit.png and a_gtFine.png, or a.jpg and a.png.
    lonely = [
        n for n in names if not n.endswith(suffixes[0]) or n.removesuffix(suffixes[0]) + suffixes[1] not in partners
    ]
    if not stem or lonely:
        raise DistillError(
            f'{option}: image {(lonely or names)[0]!r} of {images} has no label map in {maps}; their names '
            'must be equal up to an ending that is the same for all, such as .jpg and .png.'
        )
    values: set[int] = set()
    for name in labels[:: max(1, len(labels) // READ)]:
        with Image.open(os.path.join(maps, name)) as picture:
            if picture.mode not in ('L', 'P', 'I', 'I;16', '1'):
                raise DistillError(
                    f'{option}: {os.path.join(maps, name)!r} is a picture (mode {picture.mode}), not a label map; '
                    'write one channel that holds the number of the class at each pixel.'
                )
            values |= set(np.unique(np.array(picture)).tolist())
    with Image.open(os.path.join(images, names[0])) as picture:
        size = picture.size
    return Maps(images, maps, len(names), suffixes, size, tuple(sorted(values)))


def _files(folder: str, option: str) -> list[str]:
    found = [
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder)
        for name in names
        if not name.startswith('.')
    ]
    if not found:
        raise DistillError(f'{option}: there is no file in {folder!r}.')
    return found


def class_names(args: argparse.Namespace, maps: Sequence[Maps]) -> tuple[str, ...]:
    """The classes: as given, or as many as the label maps number.

    Raises:
        DistillError: The label maps hold other numbers.
    """
    held = sorted({v for m in maps for v in m.values} - {args.ignore_index})
    if args.reduce_zero_label:
        held = [v - 1 for v in held if v > 0]
    names = tuple(args.classes or (f'class{i}' for i in range(max(held, default=-1) + 1)))
    if len(names) == 1 and os.path.isfile(names[0]):
        with open(names[0], encoding='utf-8') as file:
            names = tuple(line.strip() for line in file if line.strip())
    over = [v for v in held if v >= len(names)]
    if not names or len(set(names)) < len(names) or over:
        what = f'the label maps also hold {in_comment(over)}' if over else f'got {in_comment(names) or "none"}'
        raise DistillError(
            f'--classes must name every number from 0 on once, in order, and {what}; pixels of no class are '
            '--ignore-index N.'
        )
    return names


def text(args: argparse.Namespace, words: str) -> str:
    """The config.

    Raises:
        DistillError: Data and student do not fit.
    """
    given = {'--train': args.train, '--val': args.val}
    train, val = (read(first, second, option) for option, (first, second) in given.items())
    classes = class_names(args, (train, val))
    student = Student(args, words)
    config = student.config
    root, (images, maps, val_images, val_maps) = common_root([train.images, train.maps, val.images, val.maps])

    def change(loader: str, pair: Maps, image_folder: str, map_folder: str, more: str = '') -> str:
        given = (
            f"type='BaseSegDataset', data_root=data_root, img_suffix={pair.suffixes[0]!r}, "
            f'data_prefix=dict(img_path={image_folder!r}, seg_map_path={map_folder!r}), '
            f'seg_map_suffix={pair.suffixes[1]!r}, metainfo=metainfo, ignore_index=void, '
            f'reduce_zero_label={args.reduce_zero_label}{more}'
        )
        # Not what the base says of its own: lists of files, suffixes.
        return data_set(config, loader, lambda path: f'{path} = dict({given}, pipeline={path}.pipeline)')

    size = tuple(args.scale or train.size)
    crop = tuple(args.crop_size or _crop(config, size))
    lines = [
        f'data_root = {root!r}',
        f'# {train.count} images to train on, {val.count} to evaluate. Label maps number the classes in this order.',
        f'classes = {code(classes)}',
        f'void = {args.ignore_index}  # pixels of no class',
        '# The colours are for pictures only.',
        f'metainfo = dict(classes=classes, palette={code([list(c) for c in colours(len(classes))])})',
        f'# Width and height that images are brought to; these have {train.size[0]} x {train.size[1]}.',
        f'scale = {size!r}',
        '# Height and width of what is cut out of them to train on.',
        f'crop_size = {crop!r}',
        change('train_dataloader', train, images, maps),
        change('val_dataloader', val, val_images, val_maps, ', test_mode=True'),
        *_pipelines(config, args.reduce_zero_label),
        *_preprocessor(config),
        *(
            f'_base_.model{path}.ignore_index = void'
            for path, value in walk(config.model)
            if args.ignore_index != IGNORED and hasattr(value, 'get') and 'num_classes' in value
        ),
        *([] if args.ignore_index == IGNORED else ['_base_.val_evaluator.ignore_index = void']),
        '_base_.test_dataloader = _base_.val_dataloader',
        '_base_.test_evaluator = _base_.val_evaluator',
    ]
    name = os.path.splitext(os.path.basename(args.student.split('::')[-1]))[0]
    return student.page(
        f'{name} on {root or train.images}: {in_comment(classes)}.', '\n'.join(lines), train.count, len(classes)
    )


def _crop(config: Config, size: tuple[int, int]) -> tuple[int, int]:
    """``(height, width)``: the base's, where the images are as large; a multiple of the coarsest stride."""
    own = next((v for p, v in walk(config.train_dataloader.dataset) if p.endswith('.crop_size')), (size[1], size[0]))
    height, width = (max(32, min(side, limit) // 32 * 32) for side, limit in zip(own, size[::-1], strict=True))
    return height, width


def _pipelines(config: Config, reduce_zero: bool) -> list[str]:
    """What the transforms of the base say of its data."""
    lines = []
    for loader in ('train_dataloader', 'val_dataloader'):
        path = data_set(config, loader, str)
        inner = config
        for key in path.removeprefix('_base_.').split('.'):
            inner = inner[key]
        for at, value in walk(inner.pipeline):
            key = at.rpartition('.')[2]
            if key in SIZES and isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
                lines.append(f'{path}.pipeline{at} = {"crop_size" if key == "crop_size" else "scale"}')
            kind = value.get('type') if hasattr(value, 'get') else None
            if kind == 'RandomCrop':
                lines.append(f'{path}.pipeline{at}.ignore_index = void')
            if kind == 'LoadAnnotations':
                lines.append(f'{path}.pipeline{at}.reduce_zero_label = {reduce_zero}')
    return lines


def _preprocessor(config: Config) -> list[str]:
    lines = []
    for path, value in walk(config.model):
        if path.endswith('data_preprocessor') and value.get('size') is not None:
            lines.append(f'_base_.model{path}.size = crop_size')
        if path.endswith('data_preprocessor'):
            lines.append(f'_base_.model{path}.seg_pad_val = void')
    sliding = config.model.get('test_cfg') or {}
    if sliding.get('mode') == 'slide':
        lines.append("_base_.model.test_cfg = dict(mode='whole')  # the base slides a window of its own size")
    return lines


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The options of its own."""
    for option in ('--train', '--val'):
        parser.add_argument(
            option, nargs=2, required=True, metavar=('IMAGES', 'MAPS'), help='folder of images and of their label maps'
        )
    parser.add_argument(
        '--classes', nargs='+', metavar='NAME', help='in the order of their numbers, or a file with one a line '
        '(default: class0, class1, ...)',
    )  # fmt: skip
    parser.add_argument(
        '--ignore-index', type=int, default=IGNORED, metavar='N', help='pixels of no class (default: %(default)s)'
    )
    parser.add_argument(
        '--reduce-zero-label', action='store_true', help='0 is no class, and classes begin with 1 (ADE20K)'
    )
    parser.add_argument('--scale', type=int, nargs=2, metavar=('W', 'H'), help="default: the images' own")
    parser.add_argument('--crop-size', type=int, nargs=2, metavar=('H', 'W'), help="default: the config's, or less")
