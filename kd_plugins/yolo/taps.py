"""What the names of taps mean in a model of Ultralytics."""

from __future__ import annotations

from torch import nn

from kd_plugins.distiller import Tap, find_module
from kd_plugins.errors import DistillError, nearest
from kd_plugins.yolo.heads import BRANCHES, head_of, head_path, is_classifier, is_end_to_end

#: What the last layer is called; in other zoos it is ``bbox_head`` of a detector and ``logits`` of a classifier.
HEADS = ('head', 'bbox_head', 'logits')


def ultralytics_tap(model: nn.Module, tap: Tap, side: str, branch: str | None = None) -> Tap:
    """The tap that is meant: a name, or the path of a layer, ``'model.<number>'``.

    - ``head``: the last layer; of an end-to-end model ``head.one2many`` or ``head.one2one`` is one of its branches;
    - ``neck``: the layers that the head takes its maps from;
    - ``backbone``: the last layer of the backbone;
    - ``stages[i]``: the layers of the backbone after which the resolution falls, ``stages[-1]`` being its last layer.

    Args:
        model: Student or teacher.
        tap: As written.
        side: ``'student'`` or ``'teacher'``, for the error message.
        branch: Which branch ``head`` is, of a model that has two. Default: the one-to-many.

    Raises:
        DistillError: It names what the model does not have.
    """
    root, _, rest = tap.module.partition('.')
    where = f'{side} {str(tap)!r}'
    if root in HEADS:
        return _head(model, tap, where, rest, branch)
    if rest or root not in ('neck', 'backbone', 'stages'):
        find_module(model, tap.module, side)
        return tap
    if root == 'neck':
        sources = head_of(model).f
        layers = [sources] if isinstance(sources, int) else list(sources)
        if is_classifier(model):
            raise DistillError(f"{where}: a classify model has no neck; write 'backbone' or 'stages[-1]'.")
        if tap.index is not None:
            if not -len(layers) <= tap.index < len(layers):
                raise DistillError(f'{where}: the neck has {len(layers)} levels, neck[0] to neck[{len(layers) - 1}].')
            layers = [layers[tap.index]]
        first, *others = (f'model.{i % len(model.model)}' for i in layers)
        return tap.means(first, *others)
    found = stages(model)
    index = -1 if root == 'backbone' else tap.index
    if root == 'backbone' and tap.index is not None:
        raise DistillError(
            f"{where}: the backbone is tapped at its last layer; write 'stages[{tap.index}]' for others."
        )
    if index is None or not -len(found) <= index < len(found):
        raise DistillError(
            f'{where}: the backbone has {len(found)} stages; write stages[-1] (the last) to stages[-{len(found)}].'
        )
    return tap.means(found[index])


def _head(model: nn.Module, tap: Tap, where: str, rest: str, branch: str | None) -> Tap:
    if tap.index is not None:
        raise DistillError(f'{where}: the head is tapped as a whole; write {tap.module!r}.')
    if rest and rest not in BRANCHES:
        raise DistillError(f'{where}: a head has no branch {rest!r}: {nearest(rest, BRANCHES)}')
    two = is_end_to_end(head_of(model))
    if rest and not two:
        raise DistillError(
            f'{where}: {type(head_of(model)).__name__} of this model has one branch, because it is not end-to-end; '
            "write 'head'."
        )
    return tap.means(head_path(model), part=(rest or branch or BRANCHES[0]) if two else None)


def stages(model: nn.Module) -> list[str]:
    """The last layers of the backbone's stages, shallow to deep.

    A stage ends before a layer that halves the resolution; the last one where the backbone does.
    """
    layers = list(model.model.children())
    end = len((getattr(model, 'yaml', None) or {}).get('backbone') or layers)
    strided = [i for i, layer in enumerate(layers[:end]) if _halves(layer)]
    last = [i - 1 for i in strided if i > 0]
    return [f'model.{i}' for i in dict.fromkeys([*last, end - 1])]


def _halves(layer: nn.Module) -> bool:
    def stride(module: nn.Module) -> int:
        value = getattr(module, 'stride', 1)
        value = value[0] if isinstance(value, tuple) else value
        return value if isinstance(value, int) else 1

    return any(isinstance(m, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)) and stride(m) > 1 for m in layer.modules())
