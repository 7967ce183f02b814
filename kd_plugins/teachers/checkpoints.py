"""Reading a teacher's checkpoint without running anything that is stored in it.

``torch.load`` defaults to ``weights_only=True`` since torch 2.6, and MMEngine's checkpoints (which carry a message
hub, a config and numpy scalars) are refused by it. Turning it off would execute arbitrary pickled code. This loader
unpickles tensors and plain containers and replaces every other object by an inert placeholder.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import pickle
import re
import types
import urllib.parse
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError, in_words, nearest, shown

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
    # Arguments of a training script, timm's among them; a bag of attributes.
    ('argparse', 'Namespace'),
    ('torch._utils', '_rebuild_tensor'),
    ('torch._utils', '_rebuild_tensor_v2'),
    ('torch._utils', '_rebuild_parameter'),
    ('torch', 'Size'),
    ('torch', 'device'),
    ('torch.serialization', '_get_layout'),
}


#: Files that are suggested where one is missing.
SUFFIXES = ('.pth', '.pt', '.safetensors')
#: Where a file's weights are, the averaged ones first: the order of timm's own loader.
ENTRIES = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
#: Ends of the names of published weights: part of a hash of the file.
_HASHED = re.compile(r'-[0-9a-f]{8,}\.')


class _Placeholder(dict[Any, Any]):
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


class Weights(NamedTuple):
    """Weights out of a file.

    Attributes:
        state: By name; with the versions of the modules (``_metadata``) where the file has them.
        meta: What else the file says of the model, e.g. class names; empty when there is nothing.
        notes: For the summary: which part of the file this is, when there was a choice.
        chosen: Whether the user said which part.
    """

    state: OrderedDict[str, Tensor]
    meta: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    chosen: bool = False


#: The module that knows MMEngine's addresses, by name: nothing here may need a framework.
_ADDRESSES = 'kd_plugins.mm.schemes'


def find_file(path: Any, where: str = 'teacher.checkpoint') -> str:
    """The absolute path of a file that exists, or the internet address that a spelling means; nothing is downloaded.

    Args:
        path: A path (``~`` is the home folder), an ``http(s)`` address, or an address of MMEngine
            (``open-mmlab://...``, ``torchvision://...``).
        where: The option it came from, for error messages.

    Raises:
        DistillError: It does not exist, names beside it are suggested; or no such address is known.
    """
    if not isinstance(path, (str, os.PathLike)):
        hint = '; save the weights: torch.save(model.state_dict(), path)' if isinstance(path, (nn.Module, dict)) else ''
        raise DistillError(f'{where} must be the path of a file, got {shown(path)}{hint}.')
    text = os.path.expanduser(os.fspath(path))
    if text.startswith(('http://', 'https://')):
        return text
    if '://' in text:
        try:
            schemes = importlib.import_module(_ADDRESSES)
        except ImportError as error:
            raise DistillError(f"{where} {text!r} needs 'mmengine', which is not installed; give a file.") from error
        return schemes.resolve(text, where)
    if os.path.isfile(text):
        return os.path.abspath(text)
    suffixes = {*SUFFIXES, os.path.splitext(text)[1] or SUFFIXES[0]}
    folder = text if os.path.isdir(text) else os.path.dirname(text) or '.'
    files = [f for f in os.listdir(folder) if f.endswith(tuple(suffixes))] if os.path.isdir(folder) else []
    if os.path.isdir(text):
        held = ', '.join(sorted(files)[:5]) or 'none'
        raise DistillError(f'{where} {text!r} is a folder, not a file; it holds {held}.')
    if not os.path.isdir(folder):
        raise DistillError(f'{where} {text!r} does not exist; the folder {folder!r} does not exist either.')
    raise DistillError(f'{where} {text!r} does not exist; in {folder!r}: {nearest(os.path.basename(text), files)}')


def load_checkpoint(path: Any, where: str = 'teacher.checkpoint') -> Any:
    """Read a checkpoint file on the CPU: one of torch, or ``.safetensors`` as model hubs have them.

    Args:
        path: See `find_file`; an internet address is downloaded once into torch's hub folder.
        where: The option it came from, for error messages.

    Returns:
        What the file holds; objects other than tensors, numbers, text and containers are placeholders.

    Raises:
        DistillError: The file is missing, truncated, or not a checkpoint.
    """
    path = find_file(path, where)
    if path.startswith(('http://', 'https://')):
        path = _download(path, where)
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
    name = os.path.basename(urllib.parse.urlsplit(url).path) or 'weights'
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    if not _HASHED.search(name):
        # `pytorch_model.bin` and `best.pth` are the names of many files. Published ones say whose they are.
        folder = os.path.join(folder, 'kd_plugins', hashlib.sha256(url.encode()).hexdigest()[:16])
    target = os.path.join(folder, name)
    if not os.path.exists(target):
        os.makedirs(folder, exist_ok=True)
        try:
            # Written under a temporary name and renamed, so an interrupted download is not taken for a file.
            torch.hub.download_url_to_file(url, target)
        except Exception as error:
            raise DistillError(
                f'{where} {url!r} could not be downloaded ({in_words(error)}); give a local file.'
            ) from error
    return target


def find_weights(checkpoint: Any, source: str, where: str = 'teacher.checkpoint', prefix: str | None = None) -> Weights:
    """The weights and the metadata in a checkpoint.

    Of several sets of weights in a file the averaged ones are taken, in timm's own order: ``state_dict_ema``,
    ``model_ema``, ``state_dict``, ``model``. In MMEngine's files ``state_dict`` *is* the average, because `EMAHook`
    exchanges it for the trained weights, which it saves as ``ema_state_dict``. Of a file with none of these entries
    everything is taken, entries being the beginnings of names (``net.conv1.weight``), see `match_names`. The second set
    of weights that EMA training in mmdet 2 left in the state dict is left out (``ema_backbone_stem_...``: the raw ones,
    while the model's own names hold the averaged ones).

    Args:
        checkpoint: What :func:`load_checkpoint` returned.
        source: Its path, for the error message.
        where: The option that it came from, for the error message.
        prefix: What the names of the wanted part begin with, entries of the file included; None: not said.

    Raises:
        DistillError: There are no weights in it, or none under these names.
    """
    sets = _sets(checkpoint) if isinstance(checkpoint, Mapping) else {}
    if not sets:
        raise _holds_none(checkpoint, source, where)
    meta = checkpoint.get('meta')
    entry = next((name for name in ENTRIES if name in sets), None)
    state = _joined(sets) if entry is None else _joined({'': sets[entry]})
    notes: tuple[str, ...] = ()
    if prefix is not None:
        found = cut(state, prefix) or cut(_joined(sets), prefix)
        if not found:
            starts = {*(k.partition('.')[0] + '.' for k in state if '.' in k), *(f'{name}.' for name in sets if name)}
            raise DistillError(
                f'{where}_prefix={prefix!r}: no name in {source!r} begins with it; {nearest(prefix, starts)}'
            )
        state = found
    elif entry is not None:
        others = [n for n, other in sets.items() if n != entry and 2 * len(other) >= len(sets[entry])]
        notes = (_which(entry, others, checkpoint),) if others else ()
    copies = {'ema_' + k.replace('.', '_') for k in state}
    for key in [k for k in state if k in copies]:
        del state[key]
    return Weights(state, meta if isinstance(meta, Mapping) else {}, notes, prefix is not None)


def check_prefix(prefix: Any, where: str = 'teacher.checkpoint') -> None:
    """Refuse what is no beginning of names; None is.

    Raises:
        DistillError: It is no text.
    """
    if prefix is not None and not isinstance(prefix, str):
        raise DistillError(
            f"{where}_prefix must be what names in the file begin with, e.g. 'teacher.', got {shown(prefix)}."
        )


def _which(entry: str, others: Sequence[str], checkpoint: Mapping[str, Any]) -> str:
    names = ', '.join(map(repr, others[:3]))
    if entry == 'state_dict' and others == ['ema_state_dict'] and 'message_hub' in checkpoint:
        return f'weights are the averaged ones: {entry!r} of a file of MMEngine, whose others are in {names}'
    return f'weights are {entry!r} of the file, not {names}'


def _sets(content: Mapping[str, Any], path: str = '') -> dict[str, Mapping[str, Any]]:
    """Mappings of names to tensors by the entry that they are in; '' is the file itself."""
    found = {path: content} if any(isinstance(v, Tensor) for v in content.values()) else {}
    for key, value in content.items():
        # An optimizer's state has numbers for names.
        if isinstance(key, str) and isinstance(value, Mapping) and path.count('.') < 3:
            found.update(_sets(value, f'{path}.{key}' if path else key))
    return found


def _joined(sets: Mapping[str, Mapping[str, Any]]) -> OrderedDict[str, Tensor]:
    """One state dict of several, under names that begin with theirs; what modules say of their versions is kept."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    versions: dict[str, Any] = {}
    for entry, held in sets.items():
        start = f'{entry}.' if entry else ''
        state.update((start + k, v) for k, v in held.items() if isinstance(k, str) and isinstance(v, Tensor))
        known = versions_of(held)
        if isinstance(known, Mapping):
            versions.update((f'{start}{k}.'.strip('.'), v) for k, v in known.items() if isinstance(v, Mapping))
    return with_versions(state, versions or None)


def cut(state: Mapping[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    """The part of a state dict whose names begin with a prefix, without it."""
    found = OrderedDict((k[len(prefix) :], v) for k, v in state.items() if k.startswith(prefix))
    versions = versions_of(state)
    if versions is not None:
        # Its keys are modules, without a dot at the end; the whole model is ''.
        inside = [k for k in versions if f'{k}.'.startswith(prefix) or not prefix]
        versions = {f'{k}.'[len(prefix) :].removesuffix('.'): versions[k] for k in inside}
    return with_versions(found, versions)


def versions_of(state: Mapping[str, Tensor]) -> Mapping[str, Any] | None:
    """What the modules of a state dict say of the version of their code, by path; None when nothing is said.

    They convert old parameters by it. torch keeps it in an attribute, which copies of the dict lose.
    """
    return getattr(state, '_metadata', None)


def with_versions(state: OrderedDict[str, Tensor], versions: Mapping[str, Any] | None) -> OrderedDict[str, Tensor]:
    """A state dict, which is changed, with what its modules say of their versions."""
    if versions is not None:
        vars(state)['_metadata'] = OrderedDict(versions)
    return state


def _holds_none(checkpoint: Any, source: str, where: str) -> DistillError:
    entries = checkpoint if isinstance(checkpoint, Mapping) else {}
    if {'model', 'date', 'version'} <= set(entries):
        return DistillError(
            f'{where} {source!r} is a model of Ultralytics, whose weights belong to its own networks; as a teacher '
            "write dict(ultralytics='<name>.pt') for it."
        )
    if isinstance(checkpoint, torch.jit.ScriptModule):
        return DistillError(
            f'{where} {source!r} is an exported network (TorchScript), not weights alone; a classifier is a teacher as '
            'dict(exported=...).'
        )
    pickled = next((k for k in ENTRIES if isinstance(entries.get(k), (_Placeholder, nn.Module))), None)
    if pickled or isinstance(checkpoint, _Placeholder) or not isinstance(checkpoint, Mapping):
        entry = f' (its entry {pickled!r})' if pickled else ''
        return DistillError(
            f'{where} {source!r} holds no weights but a pickled object{entry}, which is not loaded because it could '
            'run any code; save weights alone: torch.save(model.state_dict(), path).'
        )
    held = ', '.join(repr(k) for k in list(entries)[:8]) or 'nothing'
    return DistillError(f'{where} {source!r} holds no weights; expected a "state_dict" entry, found {held}.')
