"""``kd-plugins init``: a complete, commented config for one's own data, teacher included."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config

from kd_plugins.mm.starter import coco, images, segmentation
from kd_plugins.mm.starter.based import add_options as add_student
from kd_plugins.mm.starter.based import add_teacher, hook_of
from kd_plugins.mm.starter.page import write_new

KINDS = {
    'coco': ('a detector of mmdet, data in COCO format', coco),
    'segmentation': ('a segmentor of mmseg, folders of images and label maps', segmentation),
    'images': ('a classifier of timm, folders of images', images),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write a config.

    Args:
        argv: Words after ``init``.

    Raises:
        DistillError: Data, student or teacher are missing or do not fit; nothing was written.
    """
    words = list(argv or ())
    parser = argparse.ArgumentParser(
        prog='kd-plugins init', description='Write a complete, commented MMEngine config for your own data.'
    )
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='KIND')
    for name, (what, module) in KINDS.items():
        one = kinds.add_parser(name, help=what, description=f'A config for {what}.')
        if name == 'images':
            one.add_argument('data', metavar='DIR', help='folder with train/<class>/ and val/<class>/')
            images.add_options(one)
            add_teacher(one, images.RECIPE)
            one.add_argument('--amp', action='store_true', help='automatic mixed precision')
        else:
            module.add_parser(one)
            add_student(one, module.RECIPE)
    args = parser.parse_args(words)
    made_by = shlex.join(['kd-plugins', 'init', *words])
    text = _of_images(args, made_by, parser) if args.kind == 'images' else KINDS[args.kind][1].text(args, made_by)
    write_new(args.out, text, args.force)
    taught = 'distilled' if args.teacher else 'without a teacher'
    print(f'{args.out} is written ({taught}); look it through, then: kd-plugins train {shlex.quote(args.out)}')


def _of_images(args: Any, made_by: str, parser: argparse.ArgumentParser) -> str:
    if not args.model:
        parser.error('images needs --model, the name of a model of timm')
    folder = images.look(args.data)
    hook = hook_of(args, Config.fromstring(images.text(args, folder), '.py'))
    if hook is not None:
        hook['teacher'] |= images.order_of(hook['teacher'], folder)
    return images.text(args, folder, hook, made_by)
