"""What the names of taps mean in a classifier, whoever wrote the network."""

from __future__ import annotations

from difflib import get_close_matches

from torch import nn

from kd_plugins.distiller import Tap, find_module
from kd_plugins.errors import DistillError
from kd_plugins.teachers.stages import stages

#: Shown to whoever wants to distil into a distillation token that is not there.
EXAMPLES = 'deit_tiny_distilled_patch16_224, levit_128s, pit_ti_distilled_224, efficientformer_l1, repvit_m0_9'
#: What the logits of a classifier are called too.
HEADS = ('logits', 'head')


def classifier_tap(model: nn.Module, tap: Tap, side: str) -> Tap:
    """The tap that is meant in a classifier, whose network is ``net`` and whose logits pass ``logits``.

    Args:
        model: Student or teacher.
        tap: As written: ``'logits'`` or ``'head'``, ``'dist_logits'``, ``'stages[i]'``, ``'backbone'`` (the last
            stage), or a layer, ``'net.<path>'``.
        side: ``'student'`` or ``'teacher'``, for the error message.

    Raises:
        DistillError: It names what the model does not have.
    """
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
    if tap.module == 'backbone' and tap.index is None:
        return _stage(model, tap, -1, side, name)
    if tap.module == 'stages':
        return _stage(model, tap, tap.index, side, name)
    return _layer(model, tap, side, name)


def _stage(model: nn.Module, tap: Tap, index: int | None, side: str, name: str) -> Tap:
    paths = stages(find_module(model, 'net', side))
    if index is None or not -len(paths) <= index < len(paths):
        raise DistillError(
            f'{side} {str(tap)!r}: {name} has {len(paths)} stages; write stages[-1] (the last) to '
            f'stages[-{len(paths)}].'
        )
    found = Tap.parse(f'net.{paths[index]}', side)
    return tap.means(found.module, index=found.index)


def _layer(model: nn.Module, tap: Tap, side: str, name: str) -> Tap:
    root, _, rest = tap.module.partition('.')
    where = f'{side} {str(tap)!r}'
    if root in (*HEADS, 'dist_logits'):
        if rest or tap.index is not None:
            raise DistillError(f'{where}: logits are tapped as a whole; write {root!r}.')
        return tap.means('logits') if root == 'head' else tap
    net = find_module(model, 'net', side)
    if root != 'net':
        layers = [layer for layer, _ in net.named_modules() if layer]
        # What is called a backbone elsewhere has the layers in it.
        close = [c for path in (tap.module, rest) for c in get_close_matches(path, layers, 1, 0.8)]
        hint = f'; did you mean {f"net.{close[0]}"!r}?' if close else '.'
        raise DistillError(
            f"{where}: the taps of a classifier are 'logits', 'stages[-1]' (the last one of {name}), 'stages[-2]', ... "
            f"and its layers, 'net.<name>'{hint}"
        )
    module = find_module(model, tap.module, side)
    heads: object = getattr(net, 'get_classifier', tuple)()
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
