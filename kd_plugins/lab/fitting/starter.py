"""``kd-plugins init``: a complete, commented config for one's own data, teacher included."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from kd_plugins.errors import DistillError
from kd_plugins.lab.fitting.mm import open_pair
from kd_plugins.lab.fitting.trial import try_recipe
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
            add_teacher(one, images.RECIPES)
            one.add_argument('--amp', action='store_true', help='automatic mixed precision')
        else:
            module.add_parser(one)
            add_student(one, module.RECIPES)
    given = parser.parse_args(words)
    made_by = shlex.join(['kd-plugins', 'init', *words])

    def text(recipe: str, out: str = given.out) -> str:
        args = argparse.Namespace(**{**vars(given), 'kd': recipe, 'out': out})
        if given.kind == 'images':
            return _of_images(args, made_by, parser)
        return KINDS[given.kind][1].text(args, made_by)

    offered = KINDS[given.kind][1].RECIPES
    recipe = given.kd or offered[0]
    if given.teacher and not given.kd and len(offered) > 1:
        recipe = first_that_fits(text, offered, given)
    write_new(given.out, text(recipe), given.force)
    taught = f'distilled by {recipe}' if given.teacher else 'without a teacher'
    print(f'{given.out} is written ({taught}); look it through, then: kd-plugins train {shlex.quote(given.out)}')


def first_that_fits(text: Callable[[str, str], str], recipes: Sequence[str], args: argparse.Namespace) -> str:
    """The first recipe with which a run of the config would start; says why those before it do not fit.

    Args:
        text: ``text(recipe, file)`` makes the config for a file of that name.
        recipes: Those to try, the one that is expected to teach best first.
        args: The options; ``teacher`` and ``teacher_checkpoint`` are read.

    Raises:
        DistillError: None fits.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'config.py')
        path.write_text(text(recipes[0], str(path)), encoding='utf-8')
        pair = open_pair(str(path), args.teacher, args.teacher_checkpoint, Path(folder))
    reason = ''
    for recipe in recipes:
        trial = try_recipe(pair, recipe)
        if trial.fits:
            return recipe
        reason = f'{recipe} does not fit: {trial.reason}'
        print(f'note: {reason}')
    raise DistillError(f'{reason} (kd-plugins recipes CONFIG --teacher TEACHER tries all there are.)')


def _of_images(args: Any, made_by: str, parser: argparse.ArgumentParser) -> str:
    if not args.model:
        parser.error('images needs --model, the name of a model of timm')
    folder = images.look(args.data)
    hook = hook_of(args, Config.fromstring(images.text(args, folder), '.py'))
    if hook is not None:
        hook['teacher'] |= images.order_of(hook['teacher'], folder)
    return images.text(args, folder, hook, made_by)
