"""Any timm classifier as a teacher, at its own resolution and with its own normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kd_plugins.distiller import untouched_rng
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.errors import DistillError
from kd_plugins.teachers import PixelFormat, register_teacher
from kd_plugins.teachers.classifier import (
    Loaded,
    activation,
    as_teacher,
    channels_of,
    find_options,
    load_weights,
    wanted_classes,
)
from kd_plugins.teachers.network import (
    ClassifierNetwork,
    absolute_name,
    check_name,
    create_network,
    data_config,
    timm_names,
)

KEYS = ('timm', 'pretrained', 'options')

register_teacher('timm', __name__, "dict(timm='resnet50', checkpoint='x.pth')")


def find(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Check name, options and checkpoint; the file gets an absolute path.

    ``teacher=dict(timm='regnety_160', checkpoint='x.pth')``, where ``pretrained=True`` in place of the file takes
    timm's own weights from the internet (of ``timm='local-dir:folder'``, those in the folder), ``options`` holds more
    of what ``timm.create_model`` takes, and the others are those of `find_options`. Without ``input_size`` it sees the
    resolution of timm's ``pretrained_cfg``, e.g. 384 for a model that was trained at 384; a transformer is built for
    ``input_size``.

    Raises:
        DistillError: timm has no such model, a key is misspelt, or the file is missing.
    """
    check_name(cfg['timm'], 'teacher.timm')
    found = {**find_options(cfg, KEYS), 'timm': absolute_name(cfg['timm'])}
    pretrained = cfg.get('pretrained', False)
    if not isinstance(pretrained, bool):
        raise DistillError(f'teacher.pretrained must be True or False, got {pretrained!r}.')
    if bool(cfg.get('checkpoint')) == pretrained:
        raise DistillError(
            "teacher needs 'checkpoint' (your file) or pretrained=True (weights from the internet), and not both: a "
            'teacher with random weights would teach noise.'
        )
    if not isinstance(cfg.get('options') or {}, Mapping):
        raise DistillError(f'teacher.options must be a dict of options of {cfg["timm"]!r}, got {cfg["options"]!r}.')
    return found


def build(cfg: Mapping[str, Any], student: PixelFormat) -> tuple[Teacher, list[str]]:
    """Create the model and load its weights completely.

    Raises:
        DistillError: The checkpoint does not fit.
    """
    name, pretrained = cfg['timm'], cfg.get('pretrained', False)

    def create(number: int | None) -> nn.Module:
        return create_network(
            name,
            num_classes=number,
            in_chans=channels_of(cfg),
            input_size=cfg.get('input_size'),
            pretrained=pretrained,
            where='teacher.timm',
            **(cfg.get('options') or {}),
        )

    with untouched_rng():
        if pretrained:
            loaded = Loaded(create(wanted_classes(cfg)))
        else:
            loaded = load_weights(create, cfg, 'timm', timm_names)
    net = loaded.net
    known = (getattr(net, 'pretrained_cfg', None) or {}).get('num_classes')
    if pretrained and known is not None and known != net.num_classes:
        raise DistillError(
            f'teacher.num_classes is {net.num_classes}, but the pretrained weights of {name!r} know {known} classes, '
            'and a new head would teach noise; give a checkpoint that was trained on these classes.'
        )
    data = data_config(net)
    teacher = as_teacher(
        ClassifierNetwork(net, activation=activation(cfg)),
        cfg,
        student,
        kind='timm',
        name=f'timm {name}',
        source=f'{name}, pretrained' if pretrained else cfg['checkpoint'],
        data=data,
        size=data.input_size,
        stored=loaded.classes,
    )
    return teacher, list(loaded.notes)
