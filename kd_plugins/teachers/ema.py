"""A teacher that is the moving average of the student itself (mean teacher).

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017 (arXiv 1703.01780). Deviations: the teacher
is run in evaluation mode, as every teacher here, where the paper's sees noise of its own; statistics of batch norms are
averaged like weights.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller.host import Host
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.distiller.taps import Tap, find_module
from kd_plugins.errors import DistillError, check_keys
from kd_plugins.predictions import Form
from kd_plugins.teachers.base import ModelTeacher
from kd_plugins.teachers.pixels import PixelFormat
from kd_plugins.teachers.sources import register_teacher

KEYS = ('ema',)

register_teacher('ema', __name__, 'dict(ema=0.001)')


def find(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``teacher=dict(ema=0.001)``: the momentum of the average, see `EMATeacher`.

    Raises:
        DistillError: It is no momentum, or a key is misspelt.
    """
    check_keys(cfg, KEYS, 'teacher')
    momentum = cfg['ema']
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 < momentum <= 1:
        raise DistillError(
            f'teacher.ema must be the momentum of the moving average, a number in (0, 1], e.g. 0.001, got {momentum!r}.'
        )
    return dict(cfg)


def build(cfg: Mapping[str, Any], student: PixelFormat) -> tuple[Teacher, list[str]]:
    """The teacher; it has a model once the run begins."""
    momentum = float(cfg['ema'])
    notes = []
    if momentum > 0.5:
        notes.append(f'ema={momentum:g} follows the student at once; a decay of {momentum:g} is ema={1 - momentum:g}')
    return EMATeacher(momentum), notes


class EMATeacher(ModelTeacher):
    """The average of the student's weights over the last steps, about ``1 / momentum`` of them.

    After every step of the student's optimizer ``average += m * (student - average)``, for parameters and persistent
    buffers; whole numbers are copied. The n-th step takes ``m = max(momentum, 1 / (n + 1))``: the plain mean of all
    weights so far, until the average is as long as asked for, so that the random start is soon forgotten. In float32 at
    least: in half precision such small steps would be rounded away.

    It sees the student's own batches. `begin` copies the student as it then is, without what a run has hung on it.

    Args:
        momentum: Weight of the newest student, in (0, 1].

    Attributes:
        updates: How many steps have been averaged.
    """

    def __init__(self, momentum: float = 0.001) -> None:
        super().__init__(
            nn.Module(),
            _not_begun,
            self._prepare_student,
            name='moving average of the student',
            checkpoint='those of the student',
            kind='ema',
            channels=None,
        )
        self.momentum, self.updates = momentum, 0
        self.mode = f'average with momentum {momentum:g}, evaluation mode'
        self._pairs: list[tuple[dict[str, Any], dict[str, Any], str]] = []

    own_classes = False

    def begin(self, student: nn.Module, host: Host) -> None:
        """Start from a copy of the student."""
        self._hold(_copy(student), host.run)
        self._host, self.head = host, host.head(student)
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters()):
            self.model.float()
        self._pairs, self.updates = _pairs(self.model, student), 0

    def tap(self, tap: Tap) -> Tap:
        """What the name means in the student."""
        return self._host.tap(self.model, tap)

    def expect(self, needs: Sequence[tuple[Tap, type[Form] | None]]) -> None:
        """Heads return what the student's return in training, where their own flag is all that it takes."""
        for tap, form in needs:
            if form is not None and form.trains_alone:
                find_module(self.model, tap.module, 'teacher').training = True

    def to(self, like: Tensor) -> Teacher:
        """Follow the device of the student's inputs; the precision stays."""
        first = next(self.model.parameters(), None)
        if first is not None and first.device != like.device:
            self.model.to(like.device)
        return self

    @torch.no_grad()
    def after_step(self) -> None:
        """Take the student's new weights into the average."""
        self.updates += 1
        averages, newest = [], []
        for own, theirs, key in self._pairs:
            average, new = own[key], theirs[key]
            if average.is_floating_point():
                averages.append(average)
                newest.append(new if new.dtype == average.dtype else new.to(average.dtype))
            else:
                average.copy_(new)
        torch._foreach_lerp_(averages, newest, max(self.momentum, 1 / (self.updates + 1)))

    def state(self) -> dict[str, Tensor]:
        """The average, and how many steps are in it; copies on the CPU."""
        weights = {f'model.{k}': v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        return {'updates': torch.tensor(self.updates), **weights}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned; after `begin`.

        Raises:
            DistillError: It is the average of another model.
        """
        own = self.model.state_dict()
        saved = {k.removeprefix('model.'): v for k, v in state.items() if k != 'updates'}
        wrong = sorted(set(own) ^ set(saved)) + [k for k in own if k in saved and own[k].shape != saved[k].shape]
        if wrong or 'updates' not in state:
            raise DistillError(
                f'The moving average that was saved is not of this student ({", ".join(wrong[:3]) or "no updates"}); '
                'resume with the model the run was started with, or start anew from its weights.'
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(saved[key])
        self.updates = int(state['updates'])

    def _prepare_student(self, inputs: Any, samples: Any) -> Any:
        return inputs.to(self.dtype) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def _not_begun(model: nn.Module, inputs: Any, samples: Any, modules: Any) -> None:
    raise RuntimeError('begin(student, host) must come first.')


def _pairs(average: nn.Module, student: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    """Where average and student hold the same parameter or persistent buffer; what is shared once."""
    found, seen = [], set()
    for own, theirs in zip(average.modules(), student.modules(), strict=True):
        for ours, other in ((own._parameters, theirs._parameters), (own._buffers, theirs._buffers)):
            for key, value in ours.items():
                if value is None or id(value) in seen or key in own._non_persistent_buffers_set:
                    continue
                seen.add(id(value))
                found.append((ours, other, key))
    return found


def _copy(student: nn.Module) -> nn.Module:
    """A copy of a model without what belongs to the run and not to the model."""
    result = copy.deepcopy(student)
    for own, theirs in zip(result.modules(), student.modules(), strict=True):
        # Taps and activation checkpointing put a function in its place, which would run the student's own module.
        if isinstance(vars(own).get('forward'), types.FunctionType):
            del vars(own)['forward']
        for name in ('_forward_pre_hooks', '_forward_hooks'):
            hooks, originals = getattr(own, name), getattr(theirs, name)
            for key, hook in list(hooks.items()):
                # Of an object that stays the same when it is copied: the run's, as the distillation's.
                owner = getattr(hook, '__self__', None)
                if owner is not None and owner is getattr(originals[key], '__self__', None):
                    del hooks[key]
    return result
