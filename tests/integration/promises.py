"""What the tests of a run's promises share: training with a record, and comparing what came out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from tests.integration.lab import Lab, Probe, distill_hook


def zero(terms: Mapping[str, dict]) -> dict[str, dict]:
    """The same terms without weight."""
    return {name: {**term, 'weight': 0.0} for name, term in copy.deepcopy(dict(terms)).items()}


def train(lab: Lab, config: Config, check: Callable[[Runner], None] | None = None) -> tuple[Runner, list[dict]]:
    """Train in this process; the runner and what every iteration logged."""
    probe = Probe(check)
    return lab.train(config, probe), probe.logs


def own_losses(log: Mapping[str, float]) -> dict[str, float]:
    """What a plain run logs too."""
    return {k: v for k, v in log.items() if 'kd' not in k}


def is_on(log: Mapping[str, float], terms: Iterable[str]) -> bool:
    """Whether all terms were on in an iteration, or all off."""
    values = [log[f'loss_kd_{name}'] > 0 for name in terms]
    assert len(set(values)) == 1
    return values[0]


def read(path: str) -> Any:
    """The content of a checkpoint."""
    return torch.load(path, map_location='cpu', weights_only=False)


def adapters_of(runner: Runner) -> dict[str, torch.Tensor]:
    """State of a run's adapters."""
    return distill_hook(runner).session.bank.export_state()


def adapter_rates(runner: Runner) -> list[float]:
    """Learning rates of the adapters' own optimizer; none without adapters, or without distillation."""
    hook = next((h for h in runner.hooks if type(h).__name__ == 'DistillHook'), None)
    optimizer = hook.session.optimizer if hook is not None else None
    return [] if optimizer is None else [group['lr'] for group in optimizer.own.param_groups]


def resumed(config: Config) -> Config:
    """The config of the run that goes on where another was interrupted."""
    config = copy.deepcopy(config)
    config.resume, config.experiment_name = True, config.experiment_name + '_resumed'
    return config


def interrupted(lab: Lab, config: Config, iteration: int) -> Config:
    """Train until an iteration ends, and return what resumes."""
    config = copy.deepcopy(config)
    config.work_dir, config.experiment_name = config.work_dir + '_killed', config.experiment_name + '_killed'

    def die(runner: Runner) -> None:
        if runner.iter + 1 == iteration:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(lab, config, die)
    return resumed(config)


def logged(runner: Runner) -> set[str]:
    """Names of what a run logged in training."""
    return {k.removeprefix('train/') for k in runner.message_hub.log_scalars if k.startswith('train/')}
