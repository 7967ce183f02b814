"""What a data set holds, through whatever wraps it: class names and pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kd_plugins.errors import DistillError


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """The class names of a data set.

    Wrappers (concatenated, repeated, balanced, mixed ones, torch's subsets) are asked for what they wrap: their own
    ``metainfo`` is that of the first member, or a list of all.

    Args:
        dataset: Any data set of a Runner.

    Returns:
        The names in order, or None when nothing in it names them.

    Raises:
        DistillError: Its members disagree.
    """
    found, first = None, ''
    for names, source in _named(dataset):
        if found not in (None, names):
            raise DistillError(
                f'The data sets that train_dataloader joins have other classes: {first} has {_shown(found)}, {source} '
                f'has {_shown(names)}; give all of them the same metainfo=dict(classes=...).'
            )
        found, first = names, source
    return found


def _named(dataset: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Class names and who has them, of every data set that is no wrapper."""
    members = list(_members(dataset))
    for member in members:
        yield from _named(member)
    if members:
        return
    metainfo = getattr(dataset, 'metainfo', None)
    names = metainfo.get('classes') if isinstance(metainfo, Mapping) else None
    if names is not None and not isinstance(names, str):
        yield tuple(map(str, names)), _title(dataset)


def pipelines(dataset: Any) -> list[list[Any]]:
    """The transforms that images go through, one list for every data set that is no wrapper.

    Args:
        dataset: Any data set of a Runner, or its config.

    Returns:
        Lists of transforms (or their configs) in order, those of the wrappers last; empty lists where a data set shows
        none.
    """
    own = _steps(_get(dataset, 'pipeline'))
    members = list(_members(dataset))
    if not members:
        return [own]
    return [[*steps, *own] for member in members for steps in pipelines(member)]


def _steps(pipeline: Any) -> list[Any]:
    # MMEngine's Compose has `transforms`, a wrapper of mixed images a plain list.
    found = getattr(pipeline, 'transforms', pipeline)
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str) else []


def _members(dataset: Any) -> Iterator[Any]:
    """What a wrapper wraps; nothing for a data set itself."""
    several = _get(dataset, 'datasets')
    if isinstance(several, Sequence) and not isinstance(several, str):
        yield from several
        return
    one = _get(dataset, 'dataset')
    if one is not None and hasattr(one, '__getitem__'):
        yield one


def _get(dataset: Any, key: str) -> Any:
    return dataset.get(key) if isinstance(dataset, Mapping) else getattr(dataset, key, None)


def _title(dataset: Any) -> str:
    """Which of several data sets of a class it is, as far as it says so."""
    for key in ('ann_file', 'data_root', '_folder', '_source'):
        value = getattr(dataset, key, None)
        if isinstance(value, str) and value:
            return f'{type(dataset).__name__} ({value})'
    return type(dataset).__name__


def _shown(names: Sequence[str]) -> str:
    return f'{len(names)} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})'
