"""Which network a checkpoint belongs to, where file or folder say so: ``teacher=dict(checkpoint='x.pth.tar')``.

timm's ``train.py`` saves the name of the model and its arguments, MMEngine's Runner leaves the config beside its
checkpoints. Bare weights are compared with every model of timm.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import DistillError
from kd_plugins.teachers.checkpoints import find_file, find_weights, load_checkpoint
from kd_plugins.teachers.classifier import OPTIONS
from kd_plugins.teachers.network import import_timm

#: What may be said of a checkpoint whose network is not named.
KEYS = (*OPTIONS, 'options', 'allow_missing', 'allow_unexpected', 'input_scale', 'pixel_format')
#: As many classes as no file has, so that a network's classifier is known by its shapes.
_CLASSES = 100_003
#: Parameters of other shapes that a network may register and leave out: timm tries its squeeze-and-excitation blocks
#: before it uses them.
_TRIED = 8


def recognise(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The ``teacher`` mapping of one that names its checkpoint and not its network.

    Args:
        cfg: ``dict(checkpoint='x.pth.tar')``; whatever else it says stays and comes first.

    Returns:
        A mapping with ``timm`` or ``config``, and what the file knows of classes, channels, resolution and
        normalisation.

    Raises:
        DistillError: The file is missing or does not tell; the line to write is given.
    """
    path = find_file(cfg['checkpoint'])
    content = load_checkpoint(path)
    entries = content if isinstance(content, Mapping) else {}
    found = _of_timm(entries) or _of_mmengine(entries, path)
    if found is None:
        state = find_weights(content, path, prefix=cfg.get('checkpoint_prefix')).state
        found = {'timm': _named(by_shapes(state), path)}
    return {**found, **{k: v for k, v in cfg.items() if v is not None}, 'checkpoint': path}


def _of_timm(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What timm's ``train.py`` (or another script whose files name a model of timm) says."""
    args = content.get('args')
    args = vars(args) if hasattr(args, '__dict__') and not isinstance(args, Mapping) else args
    args = args if isinstance(args, Mapping) else {}
    name = args.get('model') or content.get('arch')
    if not isinstance(name, str):
        return None
    timm = import_timm('teacher.checkpoint')
    if ':' not in name and not timm.is_model(name):
        return None
    # As timm's resolve_data_config reads them.
    size = args.get('input_size') or args.get('img_size')
    channels = size[0] if isinstance(size, (list, tuple)) else args.get('in_chans')
    sides = tuple(size[-2:]) if isinstance(size, (list, tuple)) else size
    options = {**(args.get('model_kwargs') or {}), **({'global_pool': args['gp']} if args.get('gp') else {})}
    found = {
        'timm': name,
        'num_classes': args.get('num_classes'),
        'input_size': sides[0] if isinstance(sides, tuple) and len(set(sides)) == 1 else sides,
        'in_chans': None if channels == 3 else channels,
        **{k: tuple(args[k]) * (channels or 3 if len(args[k]) == 1 else 1) for k in ('mean', 'std') if args.get(k)},
        'options': options or None,
    }
    return {k: v for k, v in found.items() if v is not None}


def timm_order(classes: Iterable[str]) -> list[str]:
    """Folders in the order in which timm's readers number them: '2' before '10'."""
    import_timm('teacher')
    from timm.utils import natural_key

    return sorted(classes, key=natural_key)


def _of_mmengine(content: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    """The config that MMEngine's Runner wrote into the folder of its checkpoints."""
    meta = content.get('meta')
    run = meta.get('experiment_name') if isinstance(meta, Mapping) else None
    if not isinstance(run, str):
        return None
    folder = os.path.dirname(path)
    # The run is called <name of the config>_<date>_<time>.
    beside = [name for name in os.listdir(folder) if name.endswith('.py') and run.startswith(f'{name[:-3]}_')]
    return {'config': os.path.join(folder, max(beside, key=len))} if beside else None


class _OtherNetwork(Exception):
    """A network has parameters that the weights have not."""


def by_shapes(state: Mapping[str, Tensor]) -> list[str]:
    """The models of timm that have exactly these weights, whatever the number of classes.

    Each is built without memory, and no further than to a handful of parameters of shapes that do not occur: some
    seconds for all of timm.

    Args:
        state: Weights by name.

    Returns:
        Names, sorted.
    """
    timm = import_timm('teacher.checkpoint')
    shapes = {tuple(v.shape) for v in state.values()}
    registered = other = 0

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal registered, other
        if parameter is None:
            return
        registered += 1
        other += tuple(parameter.shape) not in shapes and _CLASSES not in parameter.shape[:1]
        # Some are registered twice.
        if other > _TRIED or registered > 2 * len(state) + _TRIED:
            raise _OtherNetwork

    found = []
    handle = register_module_parameter_registration_hook(count)
    try:
        with untouched_rng():
            for name in timm.list_models():
                registered = other = 0
                net = _sketch(functools.partial(timm.create_model, name, num_classes=_CLASSES))
                if net is not None and _fits(net, state):
                    found.append(name)
    finally:
        handle.remove()
    return sorted(found)


def _sketch(create: Callable[[], nn.Module]) -> nn.Module | None:
    try:
        with torch.device('meta'):
            return create()
    # Some need values while they are built, or packages of their own: no reason to stop at those that do not.
    except Exception:
        return None


def _fits(net: nn.Module, state: Mapping[str, Tensor]) -> bool:
    own = net.state_dict()
    # Counters of BatchNorm came with torch 0.4.1.
    if {k for k in own if not k.endswith('num_batches_tracked')} - state.keys() or state.keys() - own.keys():
        return False
    return all(v.shape[1:] == own[k].shape[1:] for k, v in state.items() if _CLASSES in own[k].shape[:1]) and all(
        v.shape == own[k].shape for k, v in state.items() if _CLASSES not in own[k].shape[:1]
    )


def _named(names: list[str], path: str) -> str:
    """The one of several equal networks after which the file is named, as published ones are; or the only one.

    Raises:
        DistillError: It cannot be told.
    """
    title = os.path.basename(path).replace('-', '_').lower()
    called = sorted((n for n in names if n in title), key=len)
    if len(names) == 1 or called:
        return called[-1] if called else names[0]
    write = "teacher=dict(timm='NAME', checkpoint=...) or --teacher timm::NAME --teacher-checkpoint ..."
    if names:
        raise DistillError(
            f'teacher.checkpoint {path!r} does not say which network it is, and its weights fit '
            f'{", ".join(names[:6])}{", ..." if len(names) > 6 else ""} of timm; write {write} with the right one.'
        )
    raise DistillError(
        f'teacher.checkpoint {path!r} does not say which network it is, and no model of timm at its default resolution '
        f"has such weights; write {write}, or teacher=dict(config='...', checkpoint=...) for a model of MMEngine."
    )
