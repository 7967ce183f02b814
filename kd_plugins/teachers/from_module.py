"""Any ``nn.Module`` that maps images to class logits as a teacher."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kd_plugins.distiller import untouched_rng
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.errors import DistillError, nearest, shown
from kd_plugins.teachers import PixelFormat, register_teacher
from kd_plugins.teachers.classifier import (
    Loaded,
    activation,
    as_teacher,
    channels_of,
    count_classes,
    find_options,
    load_weights,
    wanted_classes,
)
from kd_plugins.teachers.network import ClassifierNetwork, data_config, image_size

KEYS = ('module', 'options')

register_teacher('module', __name__, "dict(module='my_pkg.my_module:factory', checkpoint='x.pth')")


def find(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Check options and checkpoint and import the module; the file gets an absolute path.

    ``teacher=dict(module='my_pkg.my_module:factory', options=dict(depth=4), checkpoint='x.pth')``: a function or class
    that is called with ``options`` and returns an ``nn.Module`` of ``(B, C, H, W)`` normalised images to ``(B,
    classes)`` logits. ``module`` may also be the function, or a network that has its weights already (then without
    ``options``, and ``checkpoint`` may be left out; it is copied). The others are those of `find_options`; it sees the
    student's resolution unless ``input_size`` names another, and ImageNet's normalisation unless ``mean`` and ``std``
    do.

    Raises:
        DistillError: It cannot be imported or is no such thing, a key is misspelt, or the file is missing.
    """
    found = find_options(cfg, KEYS)
    made = resolve(cfg['module'])
    options = cfg.get('options') or {}
    if not isinstance(options, Mapping):
        raise DistillError(f'teacher.options must be a dict of arguments of {_name(cfg)}, got {options!r}.')
    if isinstance(made, nn.Module):
        if options:
            raise DistillError(f'teacher.module is a network already ({type(made).__name__}): remove teacher.options.')
    elif not cfg.get('checkpoint'):
        raise DistillError(
            f"teacher needs 'checkpoint': {_name(cfg)} makes a new network, and a teacher with random weights would "
            'teach noise; if it loads its own, give the network that it returns.'
        )
    return found


def build(cfg: Mapping[str, Any], student: PixelFormat) -> tuple[Teacher, list[str]]:
    """Make the network and load its weights completely.

    Raises:
        DistillError: It cannot be made, returns no logits, or the checkpoint does not fit.
    """
    made = resolve(cfg['module'])
    with untouched_rng():
        # A copy: the teacher is frozen for good, and a network that was handed over may be used elsewhere.
        net = copy.deepcopy(made) if isinstance(made, nn.Module) else _call(made, cfg)
        loaded = load_weights(lambda _: net, cfg, 'module') if cfg.get('checkpoint') else Loaded(net)
    size = image_size(cfg.get('input_size'), 'teacher.input_size')
    data = data_config(net)
    classifier = ClassifierNetwork(net, wanted_classes(cfg), activation(cfg))
    if classifier.logits.num_classes is None:
        probe = size or data.input_size
        classifier.logits.num_classes = count_classes(classifier, probe, channels_of(cfg), 'teacher.module')
    teacher = as_teacher(
        classifier,
        cfg,
        student,
        kind='module',
        name=f'{_name(cfg)} ({type(net).__name__})',
        source=cfg.get('checkpoint') or 'as it was given',
        data=data,
        size=size,
        stored=loaded.classes,
    )
    return teacher, list(loaded.notes)


def resolve(module: Any) -> nn.Module | Callable[..., Any]:
    """The network or factory that ``module`` is or names.

    Raises:
        DistillError: It cannot be imported, or is neither.
    """
    found = _imported(module) if isinstance(module, str) else module
    if not isinstance(found, nn.Module) and not callable(found):
        raise DistillError(
            f"teacher.module must be 'package.module:factory', a function or class that makes a network, or a network, "
            f'got {shown(module)}' + (f', which is of type {type(found).__name__}.' if isinstance(module, str) else '.')
        )
    return found


def _imported(path: str) -> Any:
    name, _, attribute = path.partition(':')
    if not name or not attribute:
        raise DistillError(f"teacher.module must be written 'package.module:factory', got {path!r}.")
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:
        raise DistillError(
            f'teacher.module {path!r}: {name!r} cannot be imported ({type(error).__name__}: {error}); its folder must '
            'be on PYTHONPATH.'
        ) from error
    for part in attribute.split('.'):
        if not hasattr(found, part):
            names = [n for n in vars(found) if not n.startswith('_')]
            raise DistillError(f'teacher.module {path!r}: {name!r} has no {attribute!r}; {nearest(part, names)}')
        found = getattr(found, part)
    return found


def _call(factory: Callable[..., Any], cfg: Mapping[str, Any]) -> nn.Module:
    try:
        net = factory(**(cfg.get('options') or {}))
    except Exception as error:
        raise DistillError(f'teacher.module: {_name(cfg)} failed ({type(error).__name__}: {error}).') from error
    if not isinstance(net, nn.Module):
        raise DistillError(f'teacher.module: {_name(cfg)} must return an nn.Module, but returned {net!r:.100}.')
    return net


def _name(cfg: Mapping[str, Any]) -> str:
    module = cfg['module']
    return module if isinstance(module, str) else getattr(module, '__name__', type(module).__name__)
