"""A config for a detector of mmdet and data in COCO's format."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any, NamedTuple

from kd_plugins.errors import DistillError
from kd_plugins.mm.starter.based import Student, data_set, walk
from kd_plugins.mm.starter.page import code, colours, common_root, in_comment, place

#: Where none is asked for, the first that fits: heads of one family taught best, then heads of any two, then necks.
RECIPES = ('yolo_logit', 'binary_kl', 'pkd')


class Annotations(NamedTuple):
    """What an annotation file says.

    Attributes:
        path: Absolute.
        folder: Of the images, absolute.
        classes: In the order of the file, in which mmdet numbers them whatever their ids are.
        images: How many.
        boxes: How many.
        masks: Whether objects have outlines.
    """

    path: str
    folder: str
    classes: tuple[str, ...]
    images: int
    boxes: int
    masks: bool


def read(path: str, folder: str, option: str) -> Annotations:
    """Read an annotation file.

    Raises:
        DistillError: It is none, or its images are elsewhere.
    """
    path, folder = place(path, option), place(folder, option)
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        classes = tuple(str(c['name']) for c in content['categories'])
        files = [image['file_name'] for image in content['images']]
        boxes = list(content['annotations'])
        masks = bool(boxes) and bool(boxes[0].get('segmentation'))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DistillError(
            f'{option}: {path} is no COCO file with images, annotations and categories '
            f'({type(error).__name__}: {error}).'
        ) from error
    if not classes or len(set(classes)) < len(classes):
        raise DistillError(f'{option}: the categories of {path} have no names of their own: {in_comment(classes)}.')
    if not files or not boxes:
        raise DistillError(f'{option}: {path} has {len(files)} images and {len(boxes)} annotations.')
    if not os.path.isfile(os.path.join(folder, files[0])):
        raise DistillError(
            f'{option}: the first image of {path}, {files[0]!r}, is not in {folder!r}; give their folder.'
        )
    return Annotations(path, folder, classes, len(files), len(boxes), masks)


def text(args: argparse.Namespace, words: str) -> str:
    """The config.

    Raises:
        DistillError: Data and student do not fit.
    """
    given = {'--train': args.train, '--val': args.val}
    train, val = (read(first, second, option) for option, (first, second) in given.items())
    if train.classes != val.classes:
        raise DistillError(
            f'--train and --val list other categories, or in another order ({in_comment(train.classes)} against '
            f'{in_comment(val.classes)}), and mmdet numbers them in the order of the file; make the lists equal.'
        )
    student = Student(args, words)
    config = student.config
    if not train.masks and any(path.endswith('.mask_head') for path, _ in walk(config.model)):
        raise DistillError(
            f'--student {args.student} learns masks, but the objects of {train.path} have none; take a detector.'
        )
    root, (ann, images, val_ann, val_images) = common_root([train.path, train.folder, val.path, val.folder])

    def change(file: str, folder: str) -> Any:
        given = f"type='CocoDataset', data_root=data_root, ann_file={file!r}, data_prefix=dict(img={folder + '/'!r})"
        return lambda path: f'{path}.update({given}, metainfo=metainfo)'

    scores = [p for p, _ in walk(config.val_evaluator) if p.endswith('.ann_file')]
    lines = [
        f'data_root = {root!r}',
        f'# {train.images} images with {train.boxes} objects to train on, {val.images} images to evaluate.',
        f'classes = {code(train.classes)}',
        '# The colours are for pictures only.',
        f'metainfo = dict(classes=classes, palette={code(colours(len(train.classes)))})',
        data_set(config, 'train_dataloader', change(ann, images)),
        data_set(config, 'val_dataloader', change(val_ann, val_images)),
        *(f'_base_.val_evaluator{path} = data_root + {val_ann!r}' for path in scores),
        '_base_.test_dataloader = _base_.val_dataloader',
        '_base_.test_evaluator = _base_.val_evaluator',
    ]
    name = os.path.splitext(os.path.basename(args.student.split('::')[-1]))[0]
    return student.page(
        f'{name} on {root or train.path}: {in_comment(train.classes)}.',
        '\n'.join(lines),
        train.images,
        len(train.classes),
    )


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The options of its own."""
    for option in ('--train', '--val'):
        parser.add_argument(
            option, nargs=2, required=True, metavar=('JSON', 'IMAGES'), help='annotation file and folder of its images'
        )
