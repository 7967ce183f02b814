"""Measuring pairs from the command line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import MMLogger

import kd_plugins
from kd_plugins.errors import DistillError, nearest
from kd_plugins.lab.benchmark.measure import (
    Ratio,
    Spread,
    add_options,
    chosen_sizes,
    count_operators,
    figures,
    highest_memory,
    in_new_process,
    interleave,
    machine,
    memory,
    verdict,
)
from kd_plugins.lab.benchmark.mm.batches import CLASSIFICATION, DETECTION, find_kind
from kd_plugins.lab.benchmark.mm.pair import VARIANTS, Pair, Setup, plain_config, random_teacher

AIM = 1.05
ROWS = (
    ('plain student step', ['student']),
    ('bare teacher forward', ['teacher']),
    ('both (lower bound)', ['student', 'teacher']),
    ('distilled step', ['distilled']),
)
#: Defaults on the CPU and on CUDA.
REPEATS = dict(repeats=(10, 40), steps=(1, 5))

#: Pairs by name: student (configs/ are those of this project), teacher, recipe.
PAIRS = {
    'yolox': (
        'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
        'mmdet::yolox/yolox_l_8xb8-300e_coco.py',
        'yolo_logit',
    ),
    'rtmdet': (
        'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
        'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
        'yolo_logit',
    ),
    'gfl': ('mmdet::gfl/gfl_r50_fpn_1x_coco.py', 'mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py', 'localization'),
    'gfl-feature': ('mmdet::gfl/gfl_r50_fpn_1x_coco.py', 'mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py', 'feature'),
    'yolox-feature': (
        'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
        'mmdet::yolox/yolox_l_8xb8-300e_coco.py',
        'feature',
    ),
    'deit': (
        'configs/cls/deit_tiny_token_regnety_160_imagenet.py',
        'timm::regnety_160.deit_in1k',
        'deit_token',
    ),
    'resnet': ('configs/cls/resnet18_kl_resnet34_imagenet.py', 'timm::resnet34.tv_in1k', 'kl'),
    'vit-resnet': (
        'configs/cls/resnet50_feature_deit_base_imagenet.py',
        'timm::deit_base_patch16_224.fb_in1k',
        'vit_feature',
    ),
}


def measure(setup: Setup, with_memory: bool = True) -> dict[str, Any]:
    """Measure one pair.

    Args:
        setup: The pair and how it is measured.
        with_memory: Measure peak memory too, each variant in a process of its own.

    Returns:
        Plain data: ``setup``, ``form``, ``seconds`` (per variant: median, low, high, all), ``ratio`` (value, low,
        high, aim, verdict), ``operators`` and ``waiting`` per variant, ``memory`` (bytes per variant or None),
        ``startup`` in seconds.

    Raises:
        DistillError: The pair does not fit, or the device is not there.
    """
    check(setup)
    torch.set_num_threads(setup.threads)
    with tempfile.TemporaryDirectory() as folder:
        number = find_kind(plain_config(setup.student)).number
        checkpoint = setup.checkpoint or random_teacher(setup.teacher, number, os.path.join(folder, 'teacher.pth'))
        random = setup.checkpoint != checkpoint
        setup = replace(setup, checkpoint=checkpoint)
        pair = Pair(setup, folder)
        steps = {name: pair.step(name) for name in VARIANTS}
        synchronize = torch.cuda.synchronize if setup.device == 'cuda' else None
        seconds = interleave(steps, setup.repeats, warmup=setup.warmup, steps=setup.steps, synchronize=synchronize)
        counts = {name: count_operators(step) for name, step in steps.items()}
        bound = [s + t for s, t in zip(seconds['student'], seconds['teacher'], strict=True)]
        ratio = Ratio.of(seconds['distilled'], bound)
        result = dict(
            setup={**asdict(setup), 'checkpoint': 'random weights' if random else checkpoint or setup.teacher},
            form=pair.form,
            seconds={name: {**asdict(Spread.of(values)), 'all': values} for name, values in seconds.items()},
            bound=asdict(Spread.of(bound)),
            ratio={**asdict(ratio), 'aim': AIM, 'verdict': ratio.verdict(AIM)},
            operators={name: count.total for name, count in counts.items()},
            waiting={name: count.waiting for name, count in counts.items()},
            startup=pair.startup,
            memory=None,
        )
        _close_logs()
        del pair, steps
        if with_memory:
            result['memory'] = {name: in_new_process(peak_memory, setup, name, folder) for name in VARIANTS}
    return result


def check(setup: Setup) -> None:
    """Refuse what cannot be measured.

    Raises:
        DistillError: A number is not positive, or the device is not there.
    """
    numbers = dict(
        image_size=min(setup.image_size),
        batch_size=setup.batch_size,
        repeats=setup.repeats,
        steps=setup.steps,
        threads=setup.threads,
    )
    for name, value in numbers.items():
        if value < 1:
            raise DistillError(f'{name} must be at least 1, got {value}.')
    if setup.device == 'cuda' and not torch.cuda.is_available():
        raise DistillError('--device cuda: torch sees no CUDA device here; use --device cpu.')
    if setup.amp and setup.device == 'cpu':
        raise DistillError("--amp needs --device cuda: MMEngine's AmpOptimWrapper does not work on the CPU.")


def peak_memory(setup: Setup, variant: str, work_dir: str, steps: int = 3) -> int | None:
    """Peak bytes that a variant adds to the process, weights and optimizer state included.

    Meant for a fresh process: what an allocator once had, it keeps. The teacher's figure includes the weights of the
    idle student that it is attached to.
    """
    torch.set_num_threads(setup.threads)
    device = torch.device(setup.device)
    before = memory(device)
    step = Pair(setup, work_dir, variant).step(variant)
    peak = highest_memory(step, steps, device)
    _close_logs()
    return None if peak is None or before is None else peak - before


def _close_logs() -> None:
    # The Runners' log files lie in a folder that is about to be removed.
    for name, logger in MMLogger._instance_dict.items():
        if name.startswith('benchmark'):
            for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
                handler.close()
                logger.removeHandler(handler)


def table(result: dict[str, Any]) -> str:
    """What :func:`measure` returned, for people."""
    setup, ratio = result['setup'], result['ratio']
    height, width = setup['image_size']
    steps = f' of {setup["steps"]} steps' if setup['steps'] > 1 else ''
    lines = [
        f'{setup["student"]} <- {setup["teacher"]} ({setup["checkpoint"]}), {setup["kd"]}, {result["form"]} form',
        f'{setup["batch_size"]}x3x{height}x{width}, {"float16 AMP" if setup["amp"] else "float32"}, '
        f'{setup["device"]}, {setup["threads"]} thread(s), {setup["repeats"]} interleaved repeats{steps}',
        '',
        *figures(result, ROWS),
        '',
        f'distilled / (student + teacher)  {verdict(ratio)}',
        f'start-up                         +{result["startup"]:.1f} s '
        '(teacher built, loaded and tried, adapters, summary)',
    ]
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the command line asks for, print a table per pair and write the JSON.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Returns:
        One result of :func:`measure` per pair.

    Raises:
        DistillError: The options or the pair do not fit.
    """
    parser = argparse.ArgumentParser(
        prog='benchmark.py',
        description='Cost of a distilled training step against the plain step plus a bare forward of the teacher.',
        epilog='Classifiers are given images of their own size, by default '
        f'{CLASSIFICATION["batch_size"][0]} on the CPU and {CLASSIFICATION["batch_size"][1]} on CUDA.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--zoo', choices=['mm'], default='mm', help='framework')
    parser.add_argument(
        '--pair', action='append', metavar='NAME', help=f'{", ".join(PAIRS)} or all; may be repeated (default: yolox)'
    )
    own = parser.add_argument_group('a pair of your own')
    own.add_argument('--student', metavar='CFG', help="config file or 'mmdet::path'")
    own.add_argument('--teacher', metavar='CFG', help='what tools/train.py takes: a config, timm::NAME, a .pt, ...')
    own.add_argument('--kd', metavar='RECIPE', help='name in configs/kd or file')
    own.add_argument('--teacher-checkpoint', metavar='PTH', help='weights of the teacher (default: random)')
    add_options(parser, {**DETECTION, **REPEATS})
    args = parser.parse_args(argv)
    info = machine(**{n: import_module(n).__version__ for n in ('mmengine', 'mmdet', 'timm') if find_spec(n)})
    print(', '.join(f'{k} {v}' for k, v in info.items() if v is not None), flush=True)
    results = []
    for student, teacher, kd in _pairs(args):
        kind = find_kind(plain_config(student))
        sizes = chosen_sizes(args, {**kind.sizes, **REPEATS})
        sizes['image_size'] = tuple(sizes['image_size'])
        if kind.fixed not in (None, sizes['image_size']):
            raise DistillError(
                f'--image-size {" ".join(map(str, sizes["image_size"]))}: this classifier takes images of '
                f'{kind.fixed[0]} x {kind.fixed[1]} pixels; leave the option out.'
            )
        setup = Setup(
            student,
            teacher,
            kd,
            checkpoint=args.teacher_checkpoint,
            device=args.device,
            threads=args.threads,
            amp=args.amp,
            **sizes,
        )
        results.append(measure(setup, not args.no_memory))
        print('\n' + table(results[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine=info, pairs=results), indent=1) + '\n')
    return results


def _pairs(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    own = {'--student': args.student, '--teacher': args.teacher, '--kd': args.kd}
    missing = [option for option, value in own.items() if not value]
    if not missing:
        if args.pair:
            raise DistillError('--pair names a ready pair; leave it out together with --student, --teacher and --kd.')
        return [(args.student, args.teacher, args.kd)]
    if len(missing) < len(own):
        raise DistillError(f'--student, --teacher and --kd go together; {" and ".join(missing)} is missing.')
    if args.teacher_checkpoint:
        raise DistillError('--teacher-checkpoint belongs to a pair of your own: --student, --teacher and --kd.')
    names = args.pair or ['yolox']
    if 'all' in names:
        names = list(PAIRS)
    for name in names:
        if name not in PAIRS:
            raise DistillError(f'--pair {name!r} is unknown; {nearest(name, [*PAIRS, "all"])}')
    return [(_ours(student), teacher, kd) for student, teacher, kd in (PAIRS[name] for name in dict.fromkeys(names))]


def _ours(path: str) -> str:
    """Where a config of this project is, from any working folder."""
    file = Path(kd_plugins.__file__).parents[1] / path
    return os.path.relpath(file) if file.is_file() else path
