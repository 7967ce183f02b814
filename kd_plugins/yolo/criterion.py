"""The stand-in for a student's criterion that adds the KD losses and leaves no trace in copies and files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any


class KDCriterion:
    """Calls the plain criterion, then adds the KD losses to what it returned.

    A plain object, not an ``nn.Module``: as a sub-module of the student it would be in its state dict. Everything but
    the call goes to the plain criterion, also ``isinstance``: an end-to-end loss is told ``update()`` after each
    epoch, a resumed run sets its ``updates``. Copies and pickles of it are copies and pickles of the plain criterion:
    NaN recovery copies the whole student into the EMA and thus into checkpoints, which must load without this
    package.

    Args:
        plain: The criterion of the student.
        add: ``add(loss, items, predictions, batch) -> (loss, items)``.
        label: ``label(batch) -> batch`` as the plain criterion is to see it.
    """

    def __init__(
        self, plain: Any, add: Callable[..., tuple], label: Callable[[Any], Any] = lambda batch: batch
    ) -> None:
        object.__setattr__(self, '_plain', plain)
        object.__setattr__(self, '_add', add)
        object.__setattr__(self, '_label', label)

    def __call__(self, preds: Any, batch: dict[str, Any]) -> tuple:
        loss, items = self._plain(preds, self._label(batch))
        return self._add(loss, items, preds, batch)

    @property
    def __class__(self):
        # `copyreg.__newobj__` in a pickle is only accepted for an object of that class.
        return type(self._plain)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, '_plain'), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._plain, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._plain, name)

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self._plain, memo)

    def __reduce_ex__(self, protocol: int) -> Any:
        return self._plain.__reduce_ex__(protocol)


def plain_criterion(criterion: Any) -> Any:
    """The criterion itself, or the one behind a `KDCriterion`."""
    return object.__getattribute__(criterion, '_plain') if type(criterion) is KDCriterion else criterion
