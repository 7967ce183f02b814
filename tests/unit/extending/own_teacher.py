"""A user's file: a kind of teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller import Teacher
from kd_plugins.errors import DistillError, check_keys
from kd_plugins.predictions import ClassLogits
from kd_plugins.teachers import FrozenTeacher, PixelFormat, load_checkpoint, register_teacher

register_teacher('linear', __name__, "dict(linear=['one.pth', 'other.pth'])")


class Mean(nn.Module):
    """The mean logits of several linear classifiers of pixels."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.logits = ClassLogits(len(weights[0]))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(torch.stack([images.flatten(1) @ w.T for w in self.weights]).mean(0))


def find(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what is misspelt, before anything is loaded."""
    check_keys(cfg, ('linear',), 'teacher')
    if not isinstance(cfg['linear'], list):
        raise DistillError(f'teacher.linear must be a list of files, got {cfg["linear"]!r}.')
    return dict(cfg)


def build(cfg: Mapping[str, Any], student: PixelFormat) -> tuple[Teacher, list[str]]:
    """The teacher, and what the summary should say of it."""
    net = Mean([load_checkpoint(path, 'teacher')['weight'] for path in cfg['linear']])
    teacher = FrozenTeacher(net, lambda model, images, *_: model(images), lambda images, _: images, name='linear')
    return teacher, [f'the mean of {len(net.weights)}']
