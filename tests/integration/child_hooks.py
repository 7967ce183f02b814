"""Hooks for runs in child processes; imported through ``custom_imports``."""

import os
import signal

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from tests.integration.lab import skip_overhead, weights

skip_overhead()
if not torch.cuda.is_available():
    # MMEngine's pytorch launcher calls it whatever the backend is.
    torch.cuda.set_device = lambda device: None


@HOOKS.register_module()
class KillAt(Hook):
    """Kills this very process, as the system does, after an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter + 1 == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)


def _bank(runner):
    """The trained adapters of a distilled run, or None."""
    session = next((h.session for h in runner.hooks if type(h).__name__ == 'DistillHook'), None)
    return session.bank if session is not None and session.trainable else None


@HOOKS.register_module()
class Dump(Hook):
    """Writes losses and gradients of every iteration and the final weights, one file per rank."""

    priority = 'LOWEST'

    def __init__(self, path: str) -> None:
        self.path = path
        self.logs, self.gradients, self.iterations = [], [], []

    def before_train(self, runner) -> None:
        model = getattr(runner.model, 'module', runner.model)

        def keep(optimizer, args, kwargs):
            self.gradients.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})

        def keep_own(optimizer, args, kwargs):
            # As they are averaged over the ranks; it steps right after the student's.
            bank = _bank(runner)
            trained = {k: p.grad for k, p in bank.named_parameters() if p.grad is not None}
            self.gradients[-1].update({f'kd_adapters.{k}': grad.clone() for k, grad in trained.items()})

        runner.optim_wrapper.optimizer.register_step_pre_hook(keep)
        if _bank(runner) is not None:
            hook = next(h for h in runner.hooks if type(h).__name__ == 'DistillHook')
            hook.session.optimizer.own.register_step_pre_hook(keep_own)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.iterations.append(runner.iter)
        self.logs.append({k: float(v) for k, v in outputs.items()})

    def after_train(self, runner) -> None:
        bank = _bank(runner)
        torch.save(
            dict(
                weights=weights(runner),
                adapters=bank.export_state() if bank is not None else {},
                gradients=self.gradients,
                logs=self.logs,
                iterations=self.iterations,
                wrapper=type(runner.model).__name__,
                parameters=[tuple(p.shape) for p in runner.model.parameters()],
            ),
            f'{self.path}{get_rank()}',
        )
