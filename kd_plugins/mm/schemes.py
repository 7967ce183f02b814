"""What the addresses of checkpoints mean in MMEngine: names of published weights instead of files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from mmengine.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from kd_plugins.errors import DistillError, nearest

#: MMEngine's lists of published weights by what the address begins with.
_LISTS: dict[str, Callable[[], Mapping[str, str]]] = {
    'open-mmlab': get_external_models,
    'openmmlab': get_external_models,
    'torchvision': get_torchvision_models,
    'modelzoo': get_torchvision_models,
    'mmcls': get_mmcls_models,
}


def resolve(address: str, where: str) -> str:
    """The internet address or the file behind an address of MMEngine. Nothing is downloaded.

    MMEngine's own loader would load it too, but runs what is pickled in the file.

    Args:
        address: E.g. ``'torchvision://resnet50'``.
        where: The option it came from, for error messages.

    Raises:
        DistillError: MMEngine knows no such name, or has such files in a cloud of their own.
    """
    scheme, _, name = address.partition('://')
    if scheme not in _LISTS:
        known = ', '.join(f'{s}://' for s in ('https', *_LISTS))
        raise DistillError(f'{where} {address!r} cannot be read; download the file and give its path ({known} can).')
    known = _LISTS[scheme]()
    name = get_deprecated_model_names().get(name, name)
    if name not in known:
        raise DistillError(f'{where} {address!r}: MMEngine knows no such weights; {nearest(name, known)}')
    found = known[name]
    if found.startswith(('http://', 'https://')):
        return found
    # A list of one's own (`open_mmlab.json`) lies beside its files.
    cache = os.path.join(os.environ.get('XDG_CACHE_HOME', '~/.cache'), 'mmengine')
    path = os.path.join(os.path.expanduser(os.environ.get('MMENGINE_HOME', cache)), found)
    if not os.path.isfile(path):
        raise DistillError(f'{where} {address!r} means {path!r}, which does not exist.')
    return path
