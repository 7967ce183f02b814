"""The end of a distilled run of MMEngine: the plain student as files that need nothing of this package."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine
import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from torch import nn

from kd_plugins import __version__
from kd_plugins.classification.classifier import TimmClassifier
from kd_plugins.classification.creation import timm_call
from kd_plugins.distiller.ending import Student, shorter
from kd_plugins.mm.configs import remove_distillation
from kd_plugins.mm.host import unit_of
from kd_plugins.teachers import load_checkpoint

#: The plain student, beside the checkpoint that it was made of.
WEIGHTS, CONFIG = 'kd_student.pth', 'kd_student.py'
#: How a package is asked for predictions with a config and weights, and its option for where pictures of them go.
INFERENCERS = {
    'mmdet': ('DetInferencer', 'out_dir'),
    'mmpretrain': ('ImageClassificationInferencer', 'show_dir'),
    'mmseg': ('MMSegInferencer', 'out_dir'),
}
OURS = 'kd_plugins'


def checkpoint_hook(runner: Any) -> CheckpointHook | None:
    """What saves the checkpoints of a run."""
    return next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)


def main_metric(runner: Any, metrics: Mapping[str, Any], endings: tuple[str, ...]) -> tuple[str, bool | None]:
    """The metric by which validations are compared: what the best checkpoint goes by, else what the task goes by.

    Args:
        runner: The Runner.
        metrics: What a validation measured; not empty.
        endings: Of the names of the task's own metrics.

    Returns:
        Its key, and whether more is better; None: that is not known.
    """
    hook = checkpoint_hook(runner)
    # The hook may be told several, and one rule for all of them.
    rules = dict(zip(getattr(hook, 'key_indicators', None) or (), getattr(hook, 'rules', None) or (), strict=False))
    for key, rule in rules.items():
        if key in metrics:
            return key, rule != 'less'
    own = next((key for ending in endings for key in metrics if key.endswith(ending)), None)
    return (own, True) if own is not None else (next(iter(metrics)), None)


def write_student(runner: Any, model: nn.Module) -> tuple[Student | None, int | None, str]:
    """Write the plain student: the best checkpoint of the run, or the last, without all that only a training needs.

    Args:
        runner: The Runner, whose training is over.
        model: Its model, unwrapped.

    Returns:
        The student and in which epoch (iteration) it was saved; or None twice, and why there is none.
    """
    source, best = _source(runner)
    if source is None:
        return None, None, 'no student was written, as the run left no checkpoint file (default_hooks.checkpoint)'
    saved = load_checkpoint(str(source), 'the checkpoint')
    config = plain_config(runner.cfg)
    meta = saved.get('meta', {})
    unit = unit_of(runner)[0]
    at = meta.get('epoch' if unit == 'epoch' else 'iter')
    weights, file = source.with_name(WEIGHTS), source.with_name(CONFIG)
    known = {
        'epoch': meta.get('epoch'),
        'iter': meta.get('iter'),
        'cfg': config.pretty_text,
        'dataset_meta': plain_data(getattr(runner.train_dataloader.dataset, 'metainfo', None) or {}),
        'mmengine_version': mmengine.__version__,
        'kd_plugins_version': __version__,
        'time': time.strftime('%Y%m%d_%H%M%S'),
    }
    partial = weights.with_suffix('.tmp')
    torch.save({'meta': known, 'state_dict': saved['state_dict']}, partial)
    os.replace(partial, weights)
    config.dump(file)
    shown, shown_config = shorter(weights), shorter(file)
    student = Student(
        path=shown,
        source=f'{"best" if best else "last"} checkpoint, {unit} {at}',
        holds='weights, class names and config',
        files={'config': shown_config},
        commands=commands(model, config, shown_config, shown),
    )
    return student, at, ''


def _source(runner: Any) -> tuple[Path | None, bool]:
    """The checkpoint that the student is made of, and whether it is the best."""
    hook = checkpoint_hook(runner)
    several = getattr(hook, 'best_ckpt_path_dict', None) or {}
    for path in (getattr(hook, 'best_ckpt_path', None), *several.values()):
        if path and os.path.isfile(path):
            return Path(path), True
    last = getattr(hook, 'last_ckpt', None)
    return (Path(last), False) if last and os.path.isfile(last) else (None, False)


def plain_config(config: Config) -> Config:
    """A copy of a distilled config that is the plain student's, and that imports this package only if it is used."""
    plain = copy.deepcopy(config)
    remove_distillation(plain)
    # A test with it would write its own copy over the file.
    plain.pop('work_dir', None)
    imports = plain.get('custom_imports')
    if isinstance(imports, Mapping):
        rest = {key: value for key, value in plain.items() if key != 'custom_imports'}
        names = imports.get('imports') or []
        names = [names] if isinstance(names, str) else list(names)
        if not _uses_us(rest):
            names = [name for name in names if name.partition('.')[0] != OURS]
        if names:
            plain.custom_imports = {**imports, 'imports': names}
        else:
            plain.pop('custom_imports')
    return plain


def _uses_us(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_uses_us, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_uses_us, value))
    name = value if isinstance(value, str) else getattr(value, '__module__', '')
    return str(name).partition('.')[0] == OURS


def plain_data(value: Any) -> Any:
    """Numbers, text and containers, which every loader reads; anything else as text."""
    if isinstance(value, Mapping):
        return {str(k): plain_data(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain_data, value)) if type(value) in (list, tuple) else list(map(plain_data, value))
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def commands(model: nn.Module, config: Config, file: str, weights: str) -> dict[str, str]:
    """What to do with a plain student.

    Args:
        model: The student.
        config: Its plain config.
        file: Where that is.
        weights: Where its weights are.
    """
    found = {'test': f'kd-plugins test {file} {weights}'}
    if isinstance(model, TimmClassifier):
        created = timm_call(plain_data(config.model), weights)
        if created is not None:
            sides = ', '.join(map(str, model.data_preprocessor.size or (224, 224)))
            picture = f'torch.rand(1, {config.model.get("in_chans", 3)}, {sides})'
            onnx = Path(weights).with_suffix('.onnx').as_posix()
            call = f'torch.onnx.export({created}.eval(), ({picture},), {onnx!r}, dynamo=False)'
            found['use'] = f'python -c "import timm; model = {created}.eval()"'
            # torch's other exporter needs packages that nothing else does.
            found['export'] = f'python -c "import timm, torch; {call}"'
        return found
    package = config.get('default_scope', 'mmengine')
    if package in INFERENCERS:
        name, pictures = INFERENCERS[package]
        found['use'] = (
            f'python -c "from {package}.apis import {name}; '
            f"{name}({file!r}, {weights!r})('image.jpg', {pictures}='predictions')\""
        )
        found['export'] = f'python mmdeploy/tools/deploy.py DEPLOY_CONFIG {file} {weights} image.jpg --work-dir onnx'
    return found
