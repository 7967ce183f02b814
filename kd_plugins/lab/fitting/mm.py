"""Models of MMEngine configs, built without data, weights of the internet or training."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from kd_plugins.distiller import untouched_rng
from kd_plugins.lab.fitting.trial import Pair
from kd_plugins.mm.cli import teacher_source
from kd_plugins.mm.configs import load_config
from kd_plugins.mm.example import grey_batch
from kd_plugins.mm.host import MMHost, find_in_registries
from kd_plugins.mm.inputs import student_format
from kd_plugins.mm.teacher import build_architecture, dataset_classes, num_classes
from kd_plugins.teachers.run import RunOptions, load_teachers

#: Pixels of a side at most: what fits does not depend on it, the time does.
SIDE = 256


def open_pair(student: str, teacher: str | None, checkpoint: str | None, folder: Path) -> Pair:
    """Build student and teacher.

    Args:
        student: Config.
        teacher: Config, or a model as ``kd-plugins train --teacher`` takes it; None: one like the student.
        checkpoint: The teacher's weights; None: random ones, which is enough to see what fits.
        folder: For what is written on the way.

    Raises:
        DistillError: One of them cannot be built.
    """
    with _silence():
        config = load_config(student, 'config')
        init_default_scope(config.get('default_scope', 'mmengine'))
        model, config = _built(config)
        notes = []
        if teacher is None:
            notes.append('no --teacher: tried with one like the student')
            source: dict[str, Any] = {'config': config, 'checkpoint': checkpoint}
        else:
            source = dict(teacher_source(teacher, checkpoint))
        if 'config' in source and not source.get('checkpoint'):
            notes += ['no --teacher-checkpoint: tried with random weights'] if teacher is not None else []
            source['checkpoint'] = _random_weights(source['config'], folder)
        host = MMHost(model)
        # Recipes that need them fit, whatever they are.
        host.counts = lambda: [1] * (num_classes(model) or 0)
        with untouched_rng():
            example = _batch(model, 1)[0]
        pixels = student_format(model, [[]], example)
        loaded, _ = load_teachers({'': source}, model, host, replace(pixels, size=host.task.size(model)))

    def read(recipe: str) -> RunOptions:
        return RunOptions.read(dict(teacher=source, recipe=recipe), host.task.name, more=find_in_registries)

    return Pair(
        student=model,
        teacher=loaded[''],
        host=host,
        task=host.task.name,
        batch=lambda images: _batch(model, images),
        classes=dataset_classes(config),
        count=num_classes(model),
        read=read,
        more=find_in_registries,
        notes=notes,
    )


def _batch(model: nn.Module, images: int) -> tuple[Tensor, None]:
    found = grey_batch(model, None, torch.device('cpu'), images)
    return found if MMHost(model).task.name == 'classification' else found[..., :SIDE, :SIDE], None


def _built(config: Any) -> tuple[nn.Module, Any]:
    """A model as a plain run starts with it, but for pretrained weights."""
    model, found = build_architecture({'config': config})
    with untouched_rng():
        model.init_weights()
    return model, found


def _random_weights(config: Any, folder: Path) -> str:
    model, _ = _built(config)
    path = folder / 'random.pth'
    torch.save(getattr(model, 'weights_of', model).state_dict(), path)
    return str(path)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Frameworks print what they have not found, and warn of their own defaults."""
    MMLogger.get_current_instance().setLevel('WARNING')
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
