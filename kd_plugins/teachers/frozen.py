"""The teacher: a frozen model that nothing but the distiller can reach."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller.taps import Capture, map_tensors
from kd_plugins.teachers.pixels import Padding


def _nothing() -> None:
    """What a pickled teacher becomes."""
    return None


class FrozenTeacher:
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
        padding: What its network needs beyond ``prepare``; taken off its outputs again.
    """

    mode = 'frozen, evaluation mode'

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
        padding: Padding | None = None,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self._run = run
        self._prepare, self._padding = prepare, padding
        self.name = name
        self.checkpoint = checkpoint
        self.normalization = normalization
        self.classes = None if classes is None else tuple(classes)
        self.num_classes = num_classes
        self.head, self.kind, self.channels = head, kind, channels

    def __deepcopy__(self, memo: dict) -> FrozenTeacher:
        return self

    def __copy__(self) -> FrozenTeacher:
        return self

    def __reduce__(self):
        return _nothing, ()

    def to(self, like: Tensor) -> FrozenTeacher:
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
    def outputs(self, inputs: Any, samples: Any, modules: Iterable[str]) -> Capture:
        """Run the teacher on the student's processed batch and return what the tapped modules computed.

        ``no_grad`` and not ``inference_mode``: feature losses fail on inference tensors.
        """
        modules = tuple(dict.fromkeys(modules))
        prepared = inside = self._prepare(inputs, samples)
        if self._padding is not None:
            prepared = self._padding(inside)
        with Capture(self.model, modules, 'teacher') as capture:
            capture.image_size = tuple(inside.shape[-2:]) if isinstance(inside, Tensor) else None
            self._run(self.model, prepared, samples, modules)
        if prepared is not inside:
            sizes = dict(padded=tuple(prepared.shape[-2:]), inside=capture.image_size)
            cut = functools.partial(self._padding.cut, **sizes)
            for path, calls in capture.calls.items():
                # (B, heads, N, N) attention is no map, whatever N is.
                if path not in capture.attention:
                    capture.calls[path] = [replace(call, output=map_tensors(call.output, cut)) for call in calls]
        return capture

    def begin(self, student: nn.Module) -> None:
        """Nothing: it does not depend on the student."""

    def after_step(self) -> None:
        """Nothing: it never changes."""

    def state(self) -> dict[str, Tensor]:
        """Nothing: its checkpoint says it all."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing was saved."""
