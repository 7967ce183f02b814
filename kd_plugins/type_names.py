"""The ``type`` of a config, however it is written."""

from __future__ import annotations

from typing import Any


def type_name(value: Any) -> str:
    """The short name of a ``type``, which may be a name, a name with its scope or module, or the object itself.

    Pure-Python configs hold classes and functions, and what MMEngine dumps of them holds whole paths.

    Args:
        value: E.g. ``'SGD'``, ``'mmdet.SGD'``, ``'torch.optim.sgd.SGD'`` or ``torch.optim.SGD``.

    Returns:
        The last part, ``'SGD'`` for all of these.
    """
    name = value if isinstance(value, str) else getattr(value, '__name__', str(value))
    return name.rsplit('.', 1)[-1]
