"""The teacher: a frozen model that nothing but the distiller can reach."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller.taps import Capture
from kd_plugins.errors import DistillError


def _nothing() -> None:
    """What a pickled teacher becomes."""
    return None


class Teacher:
    """A frozen model in evaluation mode, kept outside every module tree.

    It is a plain object, so it never enters a state dict, an optimizer, an EMA copy or DDP's buckets. Copying a
    structure that refers to it copies the reference; pickling leaves it out.

    Args:
        model: The loaded teacher. It is frozen and put in evaluation mode for good.
        run: ``run(model, inputs, samples, modules)`` computes what the tapped modules (dotted paths) need, and
            nothing more.
        prepare: ``prepare(inputs, samples)`` turns the student's processed batch into the teacher's.
        name: For the summary: configuration or class.
        checkpoint: For the summary: where the weights come from.
        normalization: For the summary: how inputs are brought to the teacher's normalisation.
        classes: Names of the classes it knows, in order, or None when unknown.
        num_classes: How many it predicts, or None when unknown.
        head: Path of the module whose output is what it predicts.
        kind: Key of the ``teacher`` mapping that it came from, ``''`` for others.
        channels: Image channels it takes, or None when unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[nn.Module, Any, Any, Sequence[str]], None],
        prepare: Callable[[Any, Any], Any],
        *,
        name: str,
        checkpoint: str = '',
        normalization: str = 'same as student',
        classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        head: str = '',
        kind: str = '',
        channels: int | None = 3,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self._run = run
        self._prepare = prepare
        self.name = name
        self.checkpoint = checkpoint
        self.normalization = normalization
        self.classes = None if classes is None else tuple(classes)
        self.num_classes = num_classes
        self.head, self.kind, self.channels = head, kind, channels

    def __deepcopy__(self, memo: dict) -> Teacher:
        return self

    def __copy__(self) -> Teacher:
        return self

    def __reduce__(self):
        return _nothing, ()

    def to(self, like: Tensor) -> Teacher:
        """Follow the device of the student's inputs, and their dtype where the student itself runs in it."""
        first = next(self.model.parameters(), None)
        dtype = like.dtype if like.is_floating_point() else None
        if first is not None and (first.device != like.device or (dtype is not None and first.dtype != dtype)):
            self.model.to(device=like.device, dtype=dtype)
        return self

    @property
    def parameters_count(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Parameter dtype."""
        return next((p.dtype for p in self.model.parameters()), torch.float32)

    def fingerprint(self) -> str:
        """SHA-256 over all parameters and buffers: equal before and after training, or the teacher was touched."""
        digest = hashlib.sha256()
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for key in sorted(tensors):
            value = tensors[key].detach().cpu().contiguous().reshape(-1)
            digest.update(key.encode())
            digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b'')
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, inputs: Any, samples: Any, modules: Iterable[str]) -> Capture:
        """Run the teacher on the student's processed batch and return what the tapped modules computed.

        ``no_grad`` and not ``inference_mode``: feature losses fail on inference tensors.
        """
        modules = tuple(dict.fromkeys(modules))
        prepared = self._prepare(inputs, samples)
        with Capture(self.model, modules, 'teacher') as capture:
            capture.image_size = tuple(prepared.shape[-2:]) if isinstance(prepared, Tensor) else None
            self._run(self.model, prepared, samples, modules)
        return capture


@dataclass
class LoadReport:
    """What a strict load found."""

    missing: Sequence[str] = field(default_factory=list)
    unexpected: Sequence[str] = field(default_factory=list)
    mismatched: Sequence[str] = field(default_factory=list)


def _allowed(key: str, patterns: Iterable[str]) -> bool:
    return any(key == p or key.startswith(p.rstrip('.') + '.') for p in patterns)


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    architecture: str = 'teacher.config',
) -> LoadReport:
    """Load a teacher's weights and refuse anything but a complete load.

    Args:
        model: The teacher.
        state: Its weights.
        source: Where they come from, for the message.
        allow_missing: Keys or module paths whose absence is accepted.
        allow_unexpected: Keys or module paths whose presence is accepted.
        architecture: The option that says what the model is, for the message.

    Returns:
        The accepted deviations.

    Raises:
        DistillError: Keys are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    # BatchNorm's step counter did not exist before torch 0.4.1 and is not used in evaluation.
    missing = [k for k in own if k not in state and not k.endswith('num_batches_tracked')]
    unexpected = [k for k in state if k not in own]
    mismatched = [
        f'{k} is {tuple(state[k].shape)} in the file and {tuple(own[k].shape)} in the model'
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    refused_missing = [k for k in missing if not _allowed(k, allow_missing)]
    refused_unexpected = [k for k in unexpected if not _allowed(k, allow_unexpected)]
    if mismatched or refused_missing or refused_unexpected:
        parts = []
        for count, label, keys in (
            (len(own), 'missing', refused_missing),
            (len(state), 'unexpected', refused_unexpected),
            (len(own), 'of another shape', mismatched),
        ):
            if keys:
                shown = ', '.join(keys[:3]) + (', ...' if len(keys) > 3 else '')
                parts.append(f'{len(keys)} of {count} keys {label} ({shown})')
        if not any(k in state and state[k].shape == own[k].shape for k in own):
            advice = f'it belongs to another architecture: check {architecture} and teacher.checkpoint.'
        elif mismatched:
            advice = f'check that {architecture} is the one it was trained with (width, number of classes).'
        elif architecture == 'teacher.config':
            advice = (
                'check that teacher.config is the one it was trained with, or name modules that may differ in '
                'teacher.allow_missing / teacher.allow_unexpected.'
            )
        else:
            advice = f'check that {architecture} is the one it was trained with.'
        raise DistillError(
            f'Teacher checkpoint {source!r} does not fit {type(model).__name__}: {"; ".join(parts)}; {advice}'
        )
    # Not strict=True: it would refuse the keys that may be missing.
    result = model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    left = [k for k in result.missing_keys if k not in missing and not k.endswith('num_batches_tracked')]
    if left or result.unexpected_keys:
        raise DistillError(
            f'Teacher checkpoint {source!r} was not loaded completely: {[*left, *result.unexpected_keys][:3]}.'
        )
    return LoadReport(missing, unexpected, mismatched)


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Leave every random generator (torch CPU and CUDA, numpy, random) as it was found.

    Building a teacher and the start-up dry run draw random numbers; without this, a distilled run would start from
    other student weights and shuffles than the plain run with the same seed.
    """
    import random

    import numpy

    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)
