"""Which function reads which head into a canonical form.

Detection heads are read into :class:`DensePredictions`, segmentation heads into :class:`PixelPredictions`, the logits
of classifiers into :class:`ClassPredictions`, or a head into a form of one's own. A reader turns what ``head.forward``
returned into the form::

    from kd_plugins.predictions import DensePredictions, register_reader

    @register_reader('my_project.MyHead')  # or the class itself: @register_reader(MyHead)
    def read_my_head(head, outputs, *, training):
        scores, boxes = outputs            # exactly what head.forward(features) returned
        ...
        return DensePredictions(cls=..., activation='sigmoid', level_sizes=..., strides=..., points=..., ltrb=...)

Importing the module that holds it is enough (``custom_imports`` in an MMEngine config). Test it by comparing
``read(head, outputs).boxes()`` with the boxes that the head itself decodes. For a segmentation head write
``@register_reader('my_project.MyHead', form=PixelPredictions)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.predictions.classes import ClassLogits, ClassPredictions
from kd_plugins.predictions.dense import DensePredictions
from kd_plugins.predictions.form import Form, forms

Reader = Callable[..., Form]

_readers: dict[type[Form], dict[str | type, Reader]] = {}
_unreadable: dict[str | type, str] = {}


def register_reader(target: str | type, form: type[Form] = DensePredictions) -> Callable[[Reader], Reader]:
    """Decorator: ``function(head, outputs, *, training) -> form`` reads heads of this class.

    Args:
        target: The head class, or its name: ``'package.ClassName'`` (any module of that package; nothing needs
            to be imported), or just ``'ClassName'`` for a class of that name wherever it is defined. The
            later registration of the same target wins.
        form: What the head is read into. Default: `DensePredictions`.

    Returns:
        The decorator; the function itself is returned unchanged. It gets ``outputs`` exactly as
        ``head.forward`` returned them and ``training``, the mode that the head was in during that call.

    Raises:
        DistillError: ``target`` is neither a class nor a name.
    """
    if not isinstance(target, (str, type)) or target == '':
        raise DistillError(f'A reader is registered for a head class or its name, not for {target!r}.')

    def decorate(function: Reader) -> Reader:
        _readers.setdefault(form, {})[target] = function
        return function

    return decorate


def register_unreadable(target: str | type, reason: str) -> None:
    """Say why heads of a class (and of classes that inherit from it) have no canonical form.

    Args:
        target: The class or its name, as for :func:`register_reader`.
        reason: Ends ``'Predictions of <head> cannot be read: '``; says what to do instead.
    """
    _unreadable[target] = reason


def supported_heads(form: type[Form] = DensePredictions) -> tuple[str, ...]:
    """Names of the head classes that have a reader, sorted."""
    return tuple(
        sorted({(k if isinstance(k, str) else k.__qualname__).rpartition('.')[2] for k in _readers.get(form, {})})
    )


def find_reader(head: nn.Module, form: type[Form] = DensePredictions) -> Reader:
    """The reader of a head: that of the nearest class it inherits from which has one.

    Args:
        head: The head module.
        form: What it is to be read into.

    Returns:
        The registered function.

    Raises:
        DistillError: No class of the head has a reader, or a class in between overrides how outputs are made
            or decoded. The message lists the supported heads and how to add one.
    """
    name = type(head).__name__
    override: str | None = None
    for cls in type(head).__mro__:
        reader = _lookup(_readers.get(form, {}), cls)
        if reader is not None:
            if override is None:
                return reader
            raise _refusal(name, form, f'{override} makes its outputs mean something else')
        # After the reader: what has none of ours may have one of a user's.
        reason = _lookup(_unreadable, cls)
        if reason is not None:
            raise DistillError(f'Predictions of {name} cannot be read: {reason}')
        if override is None:
            own = [m for m in form.decoding if m in vars(cls)]
            if own:
                override = f'{cls.__name__}.{own[0]}'
    for other in forms():
        if other is not form and registered(head, other):
            raise DistillError(
                f'Predictions of {name} cannot be read: it is a {other.head} head, but this loss compares {form.head} '
                f'heads; take a loss for {other.head}, or tap features.'
            )
    raise _refusal(name, form)


def readable(head: nn.Module, form: type[Form] = DensePredictions) -> bool:
    """Whether a module is a head that can be read into a form."""
    try:
        find_reader(head, form)
    except DistillError:
        return False
    return True


def registered(head: nn.Module, form: type[Form]) -> bool:
    """Whether a module is a head of this form: its class, or one it inherits from, has a reader, even if overridden."""
    return any(_lookup(_readers.get(form, {}), cls) is not None for cls in type(head).__mro__)


def known_head(head: nn.Module) -> bool:
    """Whether a module is a head that can be read into any form, or one that is known to have none."""
    tables: list[Mapping[str | type, Any]] = [_unreadable, *_readers.values()]
    return any(_lookup(table, cls) is not None for cls in type(head).__mro__ for table in tables)


def read(
    head: nn.Module,
    outputs: Any,
    *,
    training: bool | None = None,
    form: type[Form] = DensePredictions,
    part: str | None = None,
) -> Any:
    """Read what ``head.forward`` returned.

    Args:
        head: The head module.
        outputs: What its ``forward`` returned, unchanged.
        training: Mode of the head during that call. Default: ``head.training`` now.
        form: What it is to be read into.
        part: Which of several branches of the head, by name; its reader takes it as ``part``.

    Returns:
        The predictions, of class ``form``; of a detection head in float32 (float64 stays), still in the autograd graph.

    Raises:
        DistillError: The head has no reader, or is configured in a way that its reader does not support.
    """
    reader = find_reader(head, form)
    options: dict[str, Any] = dict(training=head.training if training is None else training)
    if part is not None:
        if 'part' not in inspect.signature(reader).parameters:
            raise DistillError(
                f'{type(head).__name__} has no branches, so there is no {part!r} in it; tap the whole head.'
            )
        options['part'] = part
    predictions = reader(head, outputs, **options)
    if not isinstance(predictions, form):
        raise DistillError(
            f'The reader of {type(head).__name__} returned {type(predictions).__name__}, not {form.__name__}.'
        )
    return predictions


def _lookup(table: Mapping[str | type, Any], cls: type) -> Any:
    if cls in table:
        return table[cls]
    for key, value in table.items():
        if isinstance(key, str):
            package, _, name = key.rpartition('.')
            inside = not package or cls.__module__ == package or cls.__module__.startswith(package + '.')
            if name == cls.__name__ and inside:
                return value
    return None


def _refusal(name: str, form: type[Form], because: str = '') -> DistillError:
    heads = supported_heads(form)
    supported = ', '.join(heads) or "none yet (import 'kd_plugins.mm' or 'kd_plugins.yolo')"
    own = repr(name) if form is DensePredictions else f'{name!r}, form={form.__name__}'
    return DistillError(
        f'Predictions of {name} cannot be read{because and f": {because}"}. Supported heads: {supported}. Distil its '
        f'features (--kd pkd, kd=pkd), or write a reader: @register_reader({own}) of kd_plugins.predictions.'
    )


@register_reader(ClassLogits, form=ClassPredictions)
def read_class_logits(head: ClassLogits, outputs: Tensor, *, training: bool) -> ClassPredictions:
    """Read what passed through a `ClassLogits`."""
    return ClassPredictions(outputs, head.activation)
