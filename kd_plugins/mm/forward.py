"""Running a model of the MM family just far enough for its taps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from kd_plugins.distiller import Tap, find_module
from kd_plugins.errors import DistillError
from kd_plugins.mm.task import CLASSIFICATION, task_of
from kd_plugins.teachers.taps import classifier_tap

_BODY = ('backbone', 'neck')
_ON_FEATURES = ('decode_head', 'auxiliary_head', 'rpn_head')


def run_modules(model: nn.Module, inputs: Any, samples: Any, modules: Sequence[str]) -> None:
    """Compute what the given modules need, without decoding, NMS or losses.

    The data samples are never handed to ``predict``, which writes into them.

    Args:
        model: A detector or segmentor.
        inputs: Its processed batch.
        samples: Data samples, or None.
        modules: Dotted paths of the modules that must run.
    """
    roots = list(dict.fromkeys(path.split('.')[0] for path in modules))
    heads = [root for root in roots if root not in _BODY]
    if not hasattr(model, 'extract_feat'):
        model(inputs, samples, mode='tensor')
        return
    if not heads:
        model.extract_feat(inputs)
        return
    # Segmentors skip auxiliary heads in tensor mode, and RPNs never run there on their own.
    if all(head in _ON_FEATURES for head in heads):
        features = model.extract_feat(inputs)
        for name in heads:
            _run_heads(name, getattr(model, name), features, [m for m in modules if m.split('.')[0] == name])
        return
    try:
        model(inputs, samples, mode='tensor')
    except (TypeError, AttributeError) as error:
        raise DistillError(
            f'{type(model).__name__} cannot be run for the taps {", ".join(map(repr, heads))} '
            f'({type(error).__name__}: {error}); tap its backbone or neck.'
        ) from error


def _run_heads(name: str, head: nn.Module, features: Any, modules: Sequence[str]) -> None:
    if not isinstance(head, nn.ModuleList):
        _run_head(name, head, features)
        return
    # Later stages may not even run on features alone (PointRend's samples points).
    needed = max(int(path.split('.')[1]) for path in modules)
    output = None
    for i, stage in enumerate(head[: needed + 1]):
        # The stages of a cascade refine what the one before has found; other lists are heads side by side.
        refines = 'prev_output' in inspect.signature(type(stage).forward).parameters
        output = _run_head(f'{name}.{i}', stage, features, *([output] if refines else []))


def _run_head(name: str, head: nn.Module, *inputs: Any) -> Any:
    try:
        return head.forward(*inputs)
    except TypeError as error:
        raise DistillError(
            f'{name} ({type(head).__name__}) cannot be run on features alone ({error}); tap backbone or neck.'
        ) from error


def _body(model: nn.Module) -> str:
    """What of a model has features to distil, in words."""
    return 'the neck' if 'neck' in model._modules else "its features (student='backbone')"


def openmmlab_tap(model: nn.Module, tap: Tap, side: str) -> Tap:
    """The tap that is meant: ``head``, ``neck``, ``backbone``, ``logits``, ``stages[i]``, or a path.

    Args:
        model: Student or teacher.
        tap: As written.
        side: ``'student'`` or ``'teacher'``, for the error message.

    Returns:
        The last stage for the ``decode_head`` of a cascade, which is what predicts; the module of a classifier's
        ``'stages[i]'``, of other models that output of the backbone; otherwise the tap itself.

    Raises:
        DistillError: It names a list of modules, an output of a list, or what the model does not have.
    """
    task = task_of(model)
    if task is CLASSIFICATION:
        return classifier_tap(model, tap, side)
    if tap.module in ('head', 'logits') and tap.module not in model._modules:
        if not task.head:
            raise DistillError(
                f'{side} {str(tap)!r}: {type(model).__name__} has no head that predicts for every position of the '
                f'image; distil {_body(model)} instead, e.g. --kd pkd (kd-plugins recipes CONFIG says what fits), or '
                f'tap one of its modules: {", ".join(map(repr, model._modules))}.'
            )
        tap = tap.means(task.head, index=tap.index)
    elif tap.module == 'stages' and 'stages' not in model._modules:
        if tap.index is None:
            raise DistillError(f"{side} 'stages': write which one, 'stages[-1]' is the last that the backbone returns.")
        tap = tap.means('backbone', index=tap.index)
    module = find_module(model, tap.module, side)
    if not isinstance(module, nn.ModuleList) or not len(module):
        return tap
    if tap.module == 'decode_head' and tap.index is None:
        return tap.means(f'decode_head.{len(module) - 1}')
    number = 0 if tap.index is None else min(max(tap.index, 0), len(module) - 1)
    written = '' if tap.index is None else f' instead of {str(tap)!r}'
    raise DistillError(
        f'{side} {tap.module!r} is a list of {len(module)} modules, which does not run itself; write one of them, '
        f"e.g. '{tap.module}.{number}'{written}."
    )
