"""The optimizer of the trainable adapters: it steps when the student's does, which knows nothing of it."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from kd_plugins.distiller.apart import Apart
from kd_plugins.distiller.bank import AdapterBank
from kd_plugins.distiller.ranks import sum_over_ranks, world_size
from kd_plugins.distiller.rng import untouched_rng
from kd_plugins.errors import DistillError

#: What schedules change during a run; what is asked of an optimizer whose other options do not suit adapters.
SCHEDULED = ('lr', 'momentum', 'betas', 'weight_decay')
#: Learning rate at the peak of the student's schedule where the adapters cannot have an optimizer of its kind, whose
#: rate would mean nothing to AdamW. It is torch's default.
FALLBACK_LR = 1e-3

#: An attribute of parameters for which weight decay is not meant.
NO_DECAY = 'no_weight_decay'

Clip = Callable[[list[nn.Parameter]], Any]


class AdapterOptimizer(Apart):
    """Trains an `AdapterBank` in step with the student, outside the student's optimizer.

    It equals a single optimizer on student and adapters, but that gradients are clipped on a norm of their own, and
    that the optimizer, its state dict, DDP's buckets and the checkpoints of the student are those of the plain run.

    - It is of the student's class, with the options of the group that holds most of the student's weights, where that
      class can train the adapters; else AdamW. Scheduled options (learning rate, momentum, weight decay) are taken
      from that group at every step, so that warm-up and decay are the student's.
    - It steps right after the student's has stepped; a step that the student skips is skipped. Under a `GradScaler`
      it is the scaler's second optimizer: gradients that are not finite skip its step alone and lower the scale.
    - Gradients accumulate until the student's are zeroed, also after a skipped step. A step uses them up.
    - On several ranks parameters and buffers start as those of rank 0, and gradients are averaged by one all-reduce; a
      rank without a gradient contributes zeros. Buffers stay each rank's own, as under DDP with
      ``broadcast_buffers=False``.
    - Nothing makes the host wait for the device that does not do so for the student's optimizer too.

    Args:
        bank: The adapters, on the device on which they stay, with something to train.
        student: The student's optimizer.
        clip: The largest norm of the adapters' gradients, or what is called with the list of the parameters that have
            one; None: they are not clipped.
        scaler: The `GradScaler` that scales the loss and steps the student's optimizer, or what returns it or None:
            asked at every step, because trainers make it late.

    Attributes:
        bank: The adapters.
        student: The student's optimizer.
        own: The adapters' optimizer.
        steps: How often the student's optimizer was called; fused ones are also for steps that they then skip.

    Raises:
        DistillError: The student's optimizer calls no hooks.
    """

    def __init__(
        self,
        bank: AdapterBank,
        student: Optimizer,
        *,
        clip: float | Clip | None = None,
        scaler: GradScaler | Callable[[], GradScaler | None] | None = None,
    ) -> None:
        if not hasattr(student, 'register_step_post_hook') or not getattr(student, 'param_groups', None):
            raise DistillError(
                f"The student's optimizer ({type(student).__name__}) is no torch.optim.Optimizer, so trainable "
                'adapters cannot step with it; use one of torch, or terms without adapters (adapter=None) on layers '
                'of equal shape.'
            )
        self.bank, self.student, self.steps = bank, student, 0
        self._parameters = bank.trainable()
        self._clip = functools.partial(clip_grad_norm_, max_norm=clip) if isinstance(clip, (int, float)) else clip
        self._scaler = scaler
        self._leader = _leader(student)
        if world_size() > 1:
            self._start_equal()
        self.own, self._followed, self._kind = _build(student, self._leader, list(self._parameters.values()))
        _part(self.own)
        self._base = _initial_lr(student.param_groups[self._leader])
        if not getattr(type(student).step, 'hooked', False):
            # Optimizers around another one (Lookahead) may skip torch's constructor; until the first `zero_grad` makes
            # up for it, they call no hooks.
            student.zero_grad()
        self._handle = student.register_step_post_hook(torch.compiler.disable(self._after_step))
        self._zero_grad: Callable[..., None] | None = None
        self._wrap_zero_grad()

    def __str__(self) -> str:
        return f'{type(self.own).__name__} ({self._kind})'

    def close(self) -> None:
        """Leave the student's optimizer as it was found; gradients that waited for its next step wait in vain."""
        self._forget_gradients()
        self._handle.remove()
        found = vars(self.student)
        # Whoever wrapped it after us calls ours, which does nothing more.
        if self._zero_grad is not None and found.get('zero_grad') is self._zero_grad:
            if self._before is None:
                del found['zero_grad']
            else:
                found['zero_grad'] = self._before
        self._zero_grad = None

    # ------------------------------------------------------------------ resume
    def state(self) -> dict[str, Any]:
        """What a resumed run needs: copies on the CPU that any safe loader reads."""
        stored = self.own.state
        return dict(
            adapters=self.bank.export_state(),
            optimizer={n: _on_cpu(stored[p]) for n, p in self._parameters.items() if p in stored},
            kind=type(self.own).__name__,
            steps=self.steps,
        )

    def load_state(self, state: Mapping[str, Any], source: str) -> None:
        """Restore what `state` returned; the options stay those that the student's optimizer has.

        Args:
            state: What it returned.
            source: Where it was saved, for the message.

        Raises:
            DistillError: It belongs to other adapters, or to another kind of optimizer.
        """
        kind = type(self.own).__name__
        if state.get('kind') != kind:
            raise DistillError(
                f"The optimizer of the adapters saved in {source} is {state.get('kind')!r} and this run's is {kind!r}; "
                'resume with the optimizer the run was started with, or start anew from its weights.'
            )
        self.bank.import_state(state['adapters'], source)
        # By name: a config that lists its terms in another order numbers the parameters differently.
        order = [id(p) for group in self.own.param_groups for p in group['params']]
        numbers = {name: order.index(id(p)) for name, p in self._parameters.items()}
        self.own.load_state_dict(
            {
                'state': {numbers[name]: _on_cpu(value) for name, value in state['optimizer'].items()},
                'param_groups': self.own.state_dict()['param_groups'],
            }
        )
        self.steps = int(state['steps'])

    # ------------------------------------------------------------------ every step of the student's optimizer
    # After the step and not before: an optimizer that is given a closure computes the gradients in it.
    @torch.no_grad()
    def _after_step(self, student: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if student is not self.student:
            return
        self.steps += 1
        if world_size() > 1:
            self._average()
        trained = [p for p in self._parameters.values() if p.grad is not None]
        # None while the distillation is off, which a GradScaler takes for a mistake.
        if trained:
            self._follow()
            self._step(trained)
        self._forget_gradients()

    def _step(self, trained: list[nn.Parameter]) -> None:
        scaler = self._scaler() if callable(self._scaler) else self._scaler
        if scaler is None or not scaler.is_enabled():
            if self._clip is not None:
                self._clip(trained)
            self.own.step()
            return
        skipped = getattr(self.student, 'found_inf', None)
        if skipped is not None:
            # Fused optimizers are always called and skip a step on the device. What they are told there is added to a
            # gradient of ours, which then skips as well, and no host has to know.
            grad = next(p.grad for p in trained if p.grad is not None)
            grad.add_(torch.where(skipped > 0, math.inf, 0.0).to(grad, non_blocking=True))
        if self._clip is not None:
            scaler.unscale_(self.own)
            self._clip(trained)
        scaler.step(self.own)

    def _follow(self) -> None:
        leader = self.student.param_groups[self._leader]
        for own in self.own.param_groups:
            own.update({key: leader[key] for key in self._followed if key in leader})
            if 'lr' not in self._followed:
                own['lr'] = FALLBACK_LR * _factor(leader, self._base)
            if 'weight_decay' in own and not _decays(own['params'][0]):
                own['weight_decay'] = 0.0

    def _wrap_zero_grad(self) -> None:
        # Optimizers have no hook for it. On the instance, where neither copies nor pickles of an optimizer look.
        inner, self._before = self.student.zero_grad, vars(self.student).get('zero_grad')

        @functools.wraps(inner)
        def zero_grad(*args: Any, **kwargs: Any) -> None:
            inner(*args, **kwargs)
            if self._zero_grad is not None:
                self._forget_gradients()

        self._zero_grad = zero_grad
        vars(self.student)['zero_grad'] = zero_grad

    def _forget_gradients(self) -> None:
        self.own.zero_grad(set_to_none=True)
        self.bank.unmark()

    # ------------------------------------------------------------------ several ranks
    def _start_equal(self) -> None:
        # Shards of the student differ in size between ranks, and so might the choice of the group.
        chosen = torch.tensor(self._leader, device=next(iter(self._parameters.values())).device)
        with torch.no_grad():
            for tensor in (*self.bank.parameters(), *self.bank.buffers(), chosen):
                distributed.broadcast(tensor, 0)
        self._leader = int(chosen)

    def _average(self) -> None:
        parameters = list(self.bank.marked_parameters().values())
        if not parameters:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        # Divided first, as DDP does: scaled gradients may be large.
        flat = torch.cat([g.reshape(-1) for g in gradients]).div_(world_size())
        sum_over_ranks(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _initial_lr(group: Mapping[str, Any]) -> float:
    """Before warm-up and decay: schedulers note it."""
    return float(group.get('initial_lr', group['lr']))


def _factor(group: Mapping[str, Any], base: float) -> Any:
    """Where the student's learning rate is on its schedule, as a part of its peak."""
    return group['lr'] / base if base else 0.0


def _leader(student: Optimizer) -> int:
    """The number of the group whose options a weight without any special treatment has.

    Not simply the first: with options per parameter that is the first layer, often with a smaller learning rate, and
    Ultralytics' MuSGD begins with the head, with a larger one. Groups with the optimizer's own learning rate come
    before others; of these, the options that most weights have.
    """
    groups = student.param_groups
    own = getattr(student, 'defaults', {}).get('lr')
    plain = [g for g in groups if own is not None and _initial_lr(g) == float(own)]
    sizes: dict[tuple[float, float], int] = {}
    for group in plain or groups:
        key = _treatment(group)
        sizes[key] = sizes.get(key, 0) + sum(p.numel() for p in group['params'])
    most = max(sizes, key=sizes.__getitem__)
    return next(i for i, g in enumerate(groups) if _treatment(g) == most and (len(g['params']) or not sizes[most]))


def _treatment(group: Mapping[str, Any]) -> tuple[float, float]:
    return _initial_lr(group), float(group.get('weight_decay', 0.0))


def _build(student: Optimizer, leader: int, parameters: list[nn.Parameter]) -> tuple[Optimizer, Sequence[str], str]:
    """The adapters' optimizer, the options in which it follows the student's, and how it was chosen."""
    group, kind = student.param_groups[leader], type(student)
    # Some options (how MuSGD weighs its halves) are the optimizer's, not its groups'.
    known = {k: v for k, v in {**vars(student), **group}.items() if k != 'params'}
    accepted = inspect.signature(kind).parameters
    every = {k: known[k] for k in accepted if k in known}
    scheduled = {k: v for k, v in every.items() if k in SCHEDULED}
    for options, words in ((every, "options of the student's"), (scheduled, "schedule of the student's")):
        try:
            with untouched_rng():
                _try(kind, parameters, options)
            own = kind(parameters, **options)
        except Exception:
            # Whatever the reason: options for matrices only, another optimizer inside, a closure that it needs.
            continue
        return own, [k for k in options if k in own.param_groups[0] and k in group], words
    options = {k: group[k] for k in ('weight_decay', 'fused') if group.get(k)}
    words = f"schedule of the student's {kind.__name__}, which cannot train them"
    return AdamW(parameters, lr=FALLBACK_LR, **options), ['weight_decay'], words


def _decays(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, NO_DECAY, False)


def _part(own: Optimizer) -> None:
    """Move what must not decay into a group of its own."""
    (group,) = own.param_groups
    kept, spared = ([p for p in group['params'] if _decays(p) == decays] for decays in (True, False))
    if kept and spared:
        group['params'] = kept
        own.add_param_group({**{k: v for k, v in group.items() if k != 'params'}, 'params': spared})


def _try(kind: type[Optimizer], parameters: Iterable[nn.Parameter], options: Mapping[str, Any]) -> None:
    """A step on copies: what is wrong with a parameter's shape is found there, not in the constructor."""
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    kind(copies, **options).step()


def _on_cpu(value: Any) -> Any:
    """Copies of the tensors in an optimizer's state."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {k: _on_cpu(v) for k, v in value.items()}
    return value
