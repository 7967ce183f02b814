"""Running a model of the MM family just far enough for its taps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from kd_plugins.distiller import Tap, find_module
from kd_plugins.errors import DistillError
from kd_plugins.predictions import ClassLogits
from kd_plugins.teachers.stages import stages

_BODY = ('backbone', 'neck')
#: Shown to whoever wants to distil into a distillation token that is not there.
EXAMPLES = 'deit_tiny_distilled_patch16_224, levit_128s, pit_ti_distilled_224, efficientformer_l1, repvit_m0_9'
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


def settle(model: nn.Module, tap: Tap, side: str) -> Tap:
    """The tap that is meant where a path names no module that runs itself: a list of modules, a stage, a token's head.

    Args:
        model: Student or teacher.
        tap: As written.
        side: ``'student'`` or ``'teacher'``, for the error message.

    Returns:
        The last stage for the ``decode_head`` of a cascade, which is what predicts; the module of a classifier's
        ``'stages[i]'``; otherwise the tap itself.

    Raises:
        DistillError: It names another list, an output of a list, or what the model does not have.
    """
    if isinstance(getattr(model, 'logits', None), ClassLogits):
        tap = _settle_classifier(model, tap, side)
    module = find_module(model, tap.module, side)
    if not isinstance(module, nn.ModuleList) or not len(module):
        return tap
    if tap.module == 'decode_head' and tap.index is None:
        return replace(tap, module=f'decode_head.{len(module) - 1}')
    number = 0 if tap.index is None else min(max(tap.index, 0), len(module) - 1)
    written = '' if tap.index is None else f' instead of {str(tap)!r}'
    raise DistillError(
        f'{side} {tap.module!r} is a list of {len(module)} modules, which does not run itself; write one of them, '
        f"e.g. '{tap.module}.{number}'{written}."
    )


def _settle_classifier(model: nn.Module, tap: Tap, side: str) -> Tap:
    name = getattr(model, 'model_name', type(getattr(model, 'net', model)).__name__)
    if tap.module == 'dist_logits' and not hasattr(model, 'dist_logits'):
        if side == 'teacher':
            raise DistillError(
                "teacher 'dist_logits': a teacher teaches with what it predicts; write teacher='logits'."
            )
        raise DistillError(
            f"student 'dist_logits': {name} has no distillation token; write student='logits', or take a student that "
            f'has one, e.g. {EXAMPLES}.'
        )
    if tap.module != 'stages':
        return _check_classifier_tap(model, tap, side, name)
    paths = stages(model.net)
    if tap.index is None or not -len(paths) <= tap.index < len(paths):
        raise DistillError(
            f'{side} {str(tap)!r}: {name} has {len(paths)} stages; write stages[-1] (the last) to '
            f'stages[-{len(paths)}].'
        )
    return Tap.parse(f'net.{paths[tap.index]}', side)


def _check_classifier_tap(model: nn.Module, tap: Tap, side: str, name: str) -> Tap:
    root, _, rest = tap.module.partition('.')
    where = f'{side} {str(tap)!r}'
    if root in ('logits', 'dist_logits'):
        if tap != Tap(root):
            raise DistillError(f'{where}: logits are tapped as a whole; write {root!r}.')
        return tap
    if root != 'net':
        layers = [layer for layer, _ in model.net.named_modules() if layer]
        # What is called a backbone elsewhere has the layers in it.
        close = [c for path in (tap.module, rest) for c in get_close_matches(path, layers, 1, 0.8)]
        hint = f'; did you mean {f"net.{close[0]}"!r}?' if close else '.'
        raise DistillError(
            f"{where}: the taps of a classifier are 'logits', 'stages[-1]' (the last one of {name}), 'stages[-2]', ... "
            f"and its layers, 'net.<name>'{hint}"
        )
    module = find_module(model, tap.module, side)
    heads = model.net.get_classifier() if hasattr(model.net, 'get_classifier') else ()
    for number, head in enumerate(heads if isinstance(heads, (tuple, list)) else (heads,)):
        if module is head:
            # As layers, their classes would not be matched by name, nor the token's head recognised.
            right = 'dist_logits' if number and side == 'student' else 'logits'
            raise DistillError(f'{where} is what makes the logits; write {right!r}.')
    if type(module) is nn.Sequential and tap.index is not None:
        raise DistillError(
            f'{where}: {tap.module} runs its {len(module)} layers one after the other; write '
            f"'{tap.module}.{tap.index % len(module)}' for the output of one of them."
        )
    return tap
