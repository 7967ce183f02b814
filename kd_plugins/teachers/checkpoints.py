"""Reading a teacher's checkpoint without running anything that is stored in it.

``torch.load`` defaults to ``weights_only=True`` since torch 2.6, and MMEngine's checkpoints (which carry a message
hub, a config and numpy scalars) are refused by it. Turning it off would execute arbitrary pickled code. This loader
unpickles tensors and plain containers and replaces every other object by an inert placeholder.
"""

from __future__ import annotations

import io
import os
import pickle
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_plugins.errors import DistillError, nearest

_SAFE = {
    ('collections', 'OrderedDict'),
    ('collections', 'defaultdict'),
    ('builtins', 'dict'),
    ('builtins', 'list'),
    ('builtins', 'tuple'),
    ('builtins', 'set'),
    ('builtins', 'int'),
    ('builtins', 'float'),
    ('builtins', 'str'),
    ('builtins', 'bytearray'),
    ('torch._utils', '_rebuild_tensor'),
    ('torch._utils', '_rebuild_tensor_v2'),
    ('torch._utils', '_rebuild_parameter'),
    ('torch', 'Size'),
    ('torch', 'device'),
    ('torch.serialization', '_get_layout'),
}


#: Files that are suggested where one is missing.
SUFFIXES = ('.pth', '.pt', '.safetensors')


class _Placeholder(dict):
    """Stands for an object of a class that the loader does not know; holds its state, runs none of its code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Placeholder:
        return self


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE:
            return super().find_class(module, name)
        if module == 'torch' and (name.endswith('Storage') or isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        return _Placeholder


def _pickle_module() -> types.ModuleType:
    module = types.ModuleType('kd_plugins_inert_pickle')
    vars(module).update(
        Unpickler=_Unpickler,
        load=lambda file, **kwargs: _Unpickler(file, **kwargs).load(),
        loads=lambda data, **kwargs: _Unpickler(io.BytesIO(data), **kwargs).load(),
    )
    return module


def load_checkpoint(path: str, where: str = 'teacher.checkpoint') -> dict[str, Any]:
    """Read a checkpoint file on the CPU: one of torch, or ``.safetensors`` as model hubs have them.

    Args:
        path: A local file, or an ``http(s)`` address, which is downloaded once into torch's hub folder.
        where: The option it came from, for error messages.

    Returns:
        What the file holds; objects other than tensors, numbers, text and containers are placeholders.

    Raises:
        DistillError: The file is missing, truncated, or not a checkpoint.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise DistillError(f'{where} must be the path of a checkpoint file, got {path!r}.')
    path = os.fspath(path)
    if path.startswith(('http://', 'https://')):
        path = _download(path, where)
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        files = [f for f in os.listdir(path) if f.endswith(SUFFIXES)]
        raise DistillError(
            f'{where} {path!r} is a folder, not a file; it holds {", ".join(sorted(files)[:5]) or "none"}.'
        )
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or '.'
        if os.path.isdir(folder):
            files = [f for f in os.listdir(folder) if f.endswith(SUFFIXES)]
            hint = f'in {folder!r}: {nearest(os.path.basename(path), files)}'
        else:
            hint = f'the folder {folder!r} does not exist either.'
        raise DistillError(f'{where} {path!r} does not exist; {hint}')
    if path.endswith('.safetensors'):
        return _load_safetensors(path, where)
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception:
        # Not plain weights, or broken: the inert loader below tells which.
        pass
    try:
        return torch.load(path, map_location='cpu', weights_only=False, pickle_module=_pickle_module())
    except Exception as error:
        size = os.path.getsize(path)
        raise DistillError(
            f'{where} {path!r} ({size:,} bytes) is not a readable checkpoint, it may be truncated or another kind of '
            f'file: {type(error).__name__}: {str(error).split(". ")[0].rstrip(".") or "no details"}.'
        ) from error


def _load_safetensors(path: str, where: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise DistillError(f"{where} {path!r} needs 'safetensors', which is not installed: pip install it.") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DistillError(
            f'{where} {path!r} ({os.path.getsize(path):,} bytes) is not a readable safetensors file: {error}.'
        ) from error


def _download(url: str, where: str) -> str:
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    target = os.path.join(folder, os.path.basename(url.split('?')[0]))
    if not os.path.exists(target):
        os.makedirs(folder, exist_ok=True)
        try:
            # Written under a temporary name and renamed, so an interrupted download is not taken for a file.
            torch.hub.download_url_to_file(url, target)
        except Exception as error:
            raise DistillError(f'{where} {url!r} could not be downloaded ({error}); give a local file.') from error
    return target


def find_weights(checkpoint: Any, source: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The weights and the metadata in a checkpoint.

    Understands ``{'state_dict': ...}`` (MMEngine; after EMA training this entry holds the averaged weights),
    ``{'model': ...}`` and a bare state dict; strips the ``module.`` prefix of DataParallel, and the second set of
    weights that EMA training in mmdet 2 left in the state dict (``ema_backbone_stem_...``: the raw ones, while the
    model's own names hold the averaged ones).

    Args:
        checkpoint: What :func:`load_checkpoint` returned.
        source: Its path, for the error message.

    Returns:
        The state dict and the ``meta`` mapping (empty when there is none).

    Raises:
        DistillError: There are no weights in it.
    """
    state = checkpoint
    meta: Any = {}
    if isinstance(checkpoint, Mapping):
        meta = checkpoint.get('meta', {})
        for key in ('state_dict', 'model'):
            if isinstance(checkpoint.get(key), Mapping):
                state = checkpoint[key]
                break
    weights = (
        OrderedDict((k, v) for k, v in state.items() if isinstance(v, Tensor)) if isinstance(state, Mapping) else {}
    )
    if not weights and isinstance(checkpoint, Mapping) and {'model', 'date', 'version'} <= set(checkpoint):
        raise DistillError(
            f'Checkpoint {source!r} is a model of Ultralytics, whose weights belong to its own networks; as a teacher '
            "write dict(ultralytics='<name>.pt') for it."
        )
    if not weights and (isinstance(checkpoint, _Placeholder) or not isinstance(checkpoint, Mapping)):
        raise DistillError(
            f'Checkpoint {source!r} holds no weights but a pickled object, which is not loaded because it could run '
            'any code; save weights alone: torch.save(model.state_dict(), path).'
        )
    if not weights:
        held = ', '.join(repr(k) for k in list(checkpoint)[:8])
        raise DistillError(f'Checkpoint {source!r} holds no weights; expected a "state_dict" entry, found {held}.')
    if all(k.startswith('module.') for k in weights):
        weights = OrderedDict((k[len('module.') :], v) for k, v in weights.items())
    copies = {'ema_' + k.replace('.', '_') for k in weights}
    weights = OrderedDict((k, v) for k, v in weights.items() if k not in copies)
    return weights, meta if isinstance(meta, Mapping) else {}
