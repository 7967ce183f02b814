"""Any torchvision classifier as a teacher."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from kd_plugins.distiller import untouched_rng
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.errors import DistillError, in_words, nearest, shown
from kd_plugins.teachers import PixelFormat, register_teacher
from kd_plugins.teachers.classifier import (
    activation,
    as_teacher,
    channels_of,
    find_options,
    load_weights,
)
from kd_plugins.teachers.network import ClassifierNetwork, data_config, image_size

KEYS = ('torchvision', 'options')

register_teacher('torchvision', __name__, "dict(torchvision='resnet50', checkpoint='x.pth')")


def find(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Check name, options and checkpoint; the file gets an absolute path.

    ``teacher=dict(torchvision='resnet50', checkpoint='x.pth')``; ``options`` holds more of what the model's function
    takes (``transform_input=True`` for the published weights of GoogLeNet and Inception), the others are those of
    `find_options`. It is normalised with ImageNet's statistics. A convolutional network or Swin sees the student's
    resolution unless ``input_size`` names another; a vision transformer or MaxViT is built for ``input_size``
    (default: 224) and always sees that.

    Raises:
        DistillError: torchvision has no such classifier, a key is misspelt, or the file is missing.
    """
    name = cfg['torchvision']
    check_name(name, 'teacher.torchvision')
    found = find_options(cfg, KEYS)
    if not cfg.get('checkpoint'):
        raise DistillError("teacher needs 'checkpoint': a teacher with random weights would teach noise.")
    if channels_of(cfg) != 3:
        raise DistillError(f'teacher.in_chans is {cfg["in_chans"]}, but torchvision has models for 3 channels only.')
    if not isinstance(cfg.get('options') or {}, Mapping):
        raise DistillError(f'teacher.options must be a dict of options of {name!r}, got {cfg["options"]!r}.')
    return found


def check_name(name: Any, where: str) -> None:
    """Refuse what torchvision has no classifier for.

    Raises:
        DistillError: The nearest names are given.
    """
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if not isinstance(name, str):
        raise DistillError(f"{where} must be the name of a model of torchvision, e.g. 'resnet50', got {shown(name)}.")
    if name not in names:
        raise DistillError(f'{where}: torchvision has no classifier {name!r}; {nearest(name, names)}')


def build(cfg: Mapping[str, Any], student: PixelFormat) -> tuple[Teacher, list[str]]:
    """Create the model and load its weights completely.

    Raises:
        DistillError: The model refuses an option, or the checkpoint does not fit.
    """
    name, size = cfg['torchvision'], image_size(cfg.get('input_size'), 'teacher.input_size')
    fixed = _fixed_size(name, size)

    def create(number: int | None) -> nn.Module:
        return _create(name, fixed, number, dict(cfg.get('options') or {}))

    with untouched_rng():
        net, number, stored, notes = load_weights(create, cfg, 'torchvision', torchvision_names)
    teacher = as_teacher(
        # A model that is not told otherwise has ImageNet's classes.
        ClassifierNetwork(net, number or 1000, activation(cfg)),
        cfg,
        student,
        kind='torchvision',
        name=f'torchvision {name}',
        source=cfg['checkpoint'],
        data=data_config(net),
        size=size or fixed,
        stored=stored,
    )
    return teacher, list(notes)


def torchvision_names(net: nn.Module, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights under the names of a torchvision model, where its file has a reader of older ones (DenseNet)."""
    found: list[Mapping[str, Tensor]] = []
    # It asks for the weights to be downloaded and loads them, so both are stood in for.
    weights = SimpleNamespace(get_state_dict=lambda **options: state)
    sys.modules[type(net).__module__]._load_state_dict(SimpleNamespace(load_state_dict=found.append), weights, False)
    return found[0]


def _fixed_size(name: str, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The resolution that a model is built for; None: it takes any."""
    if not name.startswith(('vit_', 'maxvit')):
        return None
    fixed = size or (224, 224)
    if name.startswith('vit_') and fixed[0] != fixed[1]:
        raise DistillError(f'teacher.input_size of {name!r} must be a square, got {fixed}.')
    return fixed


def _create(name: str, fixed: tuple[int, int] | None, num_classes: int | None, options: dict[str, Any]) -> nn.Module:
    import torchvision

    if fixed is not None:
        key, value = ('image_size', fixed[0]) if name.startswith('vit_') else ('input_size', fixed)
        options.setdefault(key, value)
    if num_classes is not None:
        options['num_classes'] = num_classes
    try:
        return torchvision.models.get_model(name, weights=None, **options)
    except Exception as error:
        given = ', '.join(f'{k}={v!r}' for k, v in options.items()) or 'no options'
        raise DistillError(
            f'teacher.torchvision: {name!r} cannot be created with {given} ({in_words(error)}).'
        ) from error
