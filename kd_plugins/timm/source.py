"""Any timm classifier as the teacher of a classifier, at its own resolution and with its own normalisation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller import (
    PixelFormat,
    Renormalize,
    Resized,
    Teacher,
    find_weights,
    load_checkpoint,
    load_strictly,
    untouched_rng,
)
from kd_plugins.errors import DistillError, check_keys, nearest

KEYS = ('timm', 'checkpoint', 'pretrained', 'num_classes', 'classes', 'input_size', 'mean', 'std')


class Classifier(nn.Module):
    """A classifier as the attribute ``head``, so that its logits can be tapped by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.head = model

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images)


def find(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Check name, options and checkpoint; the file gets an absolute path.

    Raises:
        DistillError: timm has no such model, a key is misspelt, or the file is missing.
    """
    import timm

    check_keys(cfg, KEYS, 'teacher')
    name = cfg['timm']
    if not isinstance(name, str) or not timm.is_model(name):
        raise DistillError(f'teacher.timm: timm has no model {name!r}; {nearest(name, timm.list_models())}')
    pretrained = cfg.get('pretrained', False)
    if not isinstance(pretrained, bool):
        raise DistillError(f'teacher.pretrained must be True or False, got {pretrained!r}.')
    if bool(cfg.get('checkpoint')) == pretrained:
        raise DistillError(
            "teacher needs 'checkpoint' (your file) or pretrained=True (weights from the internet), and not both: a "
            'teacher with random weights would teach noise.'
        )
    for key in ('num_classes', 'input_size'):
        value = cfg.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise DistillError(f'teacher.{key} must be a whole number >= 1, got {value!r}.')
    for key in ('mean', 'std'):
        value = cfg.get(key)
        if value is not None and (not isinstance(value, Sequence) or len(value) != 3 or isinstance(value, str)):
            raise DistillError(f'teacher.{key} must be three numbers, of pixels in [0, 1], got {value!r}.')
    found = dict(cfg)
    if cfg.get('checkpoint'):
        path = os.fspath(cfg['checkpoint'])
        if not path.startswith(('http://', 'https://')):
            path = os.path.abspath(os.path.expanduser(path))
            if not os.path.isfile(path):
                raise DistillError(f'teacher.checkpoint {os.fspath(cfg["checkpoint"])!r} does not exist.')
        found['checkpoint'] = path
    return found


def build(cfg: Mapping[str, Any], student: PixelFormat) -> tuple[Teacher, list[str]]:
    """Create the model and load its weights completely.

    Raises:
        DistillError: The checkpoint does not fit.
    """
    import timm
    from timm.data import resolve_data_config

    name, size = cfg['timm'], cfg.get('input_size')
    options = {} if cfg.get('num_classes') is None else {'num_classes': cfg['num_classes']}
    with untouched_rng():
        model = _create(timm, name, cfg.get('pretrained', False), size, options)
        source = f'{name}, pretrained'
        if cfg.get('checkpoint'):
            source = cfg['checkpoint']
            weights, _ = find_weights(load_checkpoint(source), source)
            load_strictly(model, weights, source, architecture='teacher.timm')
    data = resolve_data_config({}, model=model)
    mean, std = ([255 * float(v) for v in cfg.get(k) or data[k]] for k in ('mean', 'std'))
    height, width = (size, size) if size else data['input_size'][-2:]
    mode = data['interpolation'] if data['interpolation'] in ('bilinear', 'bicubic') else 'bicubic'
    renormalize = Renormalize(student, PixelFormat(tuple(mean), tuple(std), rgb=True))
    inputs = Resized(renormalize, (height, width), mode)
    classes, known = cfg.get('classes'), getattr(model, 'num_classes', None)
    if classes is not None and len(classes) != known:
        raise DistillError(f'teacher.classes has {len(classes)} names but the teacher predicts {known} classes.')
    teacher = Teacher(
        Classifier(model),
        _run,
        inputs,
        name=f'timm {name}',
        checkpoint=source,
        normalization=inputs.description,
        classes=classes,
        num_classes=known,
        head='head',
        kind='timm',
        channels=data['input_size'][0],
    )
    return teacher, []


def _create(timm: Any, name: str, pretrained: bool, size: int | None, options: dict[str, Any]) -> nn.Module:
    if size is not None:
        try:
            # Transformers are built for one resolution; convolutional networks do not take the option.
            return timm.create_model(name, pretrained=pretrained, img_size=size, **options)
        except TypeError:
            pass
    return timm.create_model(name, pretrained=pretrained, **options)


def _run(model: nn.Module, inputs: Tensor, samples: Any, modules: Sequence[str]) -> None:
    logits = model(inputs)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise DistillError(f'{type(model.head).__name__} returned no (B, classes) logits; use a plain classifier.')
