"""What is kept apart from everything that is copied and saved around it."""

from __future__ import annotations

from typing import Any, TypeVar

_Self = TypeVar('_Self', bound='Apart')


def _nothing() -> None:
    """What a pickle holds in its place."""
    return None


class Apart:
    """Copies of what refers to it refer to it too, and pickles leave it out.

    Frameworks copy the student (EMA), pickle it (checkpoints of whole models) and keep references to whatever hangs
    on its hooks: a teacher or the adapters' optimizer must not travel along.
    """

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        return self

    def __copy__(self: _Self) -> _Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()
