"""What distillation costs: per training step in both zoos, and per loss."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any

#: Where the benchmark of a framework is; that of the losses needs none.
ZOOS = {'mm': ('mm', 'MMPair'), 'yolo': ('yolo', 'YOLOPair')}
LOSS = ('losses', 'MapLoss')


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the command line asks for, print a table for each pair or loss and write the JSON.

    Args:
        argv: Command line; default ``sys.argv[1:]``.

    Returns:
        One result of `Benchmark.measure` for each.

    Raises:
        DistillError: The options do not fit, or something cannot be measured.
    """
    from kd_plugins.lab.benchmark.benchmark import run

    def choice(parser: argparse.ArgumentParser) -> None:
        parser.add_argument('--zoo', choices=ZOOS, default='mm', help='framework (default: mm)')
        parser.add_argument('--loss', nargs='*', metavar='NAME', help='dense losses instead of a pair')

    first = argparse.ArgumentParser(add_help=False)
    choice(first)
    chosen, _ = first.parse_known_args(argv)
    module, name = ZOOS[chosen.zoo] if chosen.loss is None else LOSS
    return run(getattr(import_module(f'{__name__}.{module}'), name), argv, choice)
