"""What all teachers that are a model have in common: nothing but the distiller can reach them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller.apart import Apart
from kd_plugins.distiller.host import Host
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.distiller.taps import Capture, Tap, image_size_of, map_tensors
from kd_plugins.predictions import Form
from kd_plugins.teachers.pixels import Padding

#: ``run(model, inputs, samples, modules)`` runs a model on its processed batch just far enough for some modules (dotted
#: paths), without decoding, NMS or losses.
Run = Callable[[nn.Module, Any, Any, Sequence[str]], Any]


class ModelTeacher(Apart):
    """A model without gradients, in evaluation mode, kept outside every module tree.

    It is a plain object, so it never enters a state dict, an optimizer, an EMA copy or DDP's buckets.

    Args:
        model: The teacher. It is frozen and put in evaluation mode for good.
        run: Computes what the tapped modules need, and nothing more.
        prepare: ``prepare(inputs, samples)`` turns the student's processed batch into the teacher's.
        name: For the summary: configuration or class.
        checkpoint: For the summary: where the weights come from.
        normalization: For the summary: how inputs are brought to the teacher's normalisation.
        classes: Names of the classes it knows, in order, or None when unknown.
        num_classes: How many it predicts, or None when unknown.
        head: Path of the module whose output is what it predicts.
        resolve: ``resolve(model, tap, side)`` says which tap is meant by a name as ``'neck'``. Default: ``'head'`` is
            ``head``, everything else is a module.
        kind: Key of the ``teacher`` mapping that it came from, ``''`` for others.
        channels: Image channels it takes, or None when unknown.
        padding: What its network needs beyond ``prepare``; taken off its outputs again.
    """

    mode = 'evaluation mode'
    own_classes = True

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        prepare: Callable[[Any, Any], Any],
        *,
        name: str,
        checkpoint: str = '',
        normalization: str = 'same as student',
        classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        head: str = '',
        resolve: Callable[[nn.Module, Tap, str], Tap] | None = None,
        kind: str = '',
        channels: int | None = 3,
        padding: Padding | None = None,
    ) -> None:
        self._hold(model, run)
        self._prepare, self._padding = prepare, padding
        self.name = name
        self.checkpoint = checkpoint
        self.normalization = normalization
        self.classes = None if classes is None else tuple(classes)
        self.num_classes = num_classes
        self.head, self.kind, self.channels = head, kind, channels
        self._resolve = resolve

    def _hold(self, model: nn.Module, run: Run) -> None:
        self.model = model.requires_grad_(False).eval()
        self._run = run

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
    def outputs(self, inputs: Any, samples: Any, modules: Iterable[str]) -> Capture:
        """Run the teacher on the student's processed batch and return what the tapped modules computed.

        ``no_grad`` and not ``inference_mode``: feature losses fail on inference tensors.
        """
        modules = tuple(dict.fromkeys(modules))
        prepared = inside = self._prepare(inputs, samples)
        if self._padding is not None:
            prepared = self._padding(inside)
        with Capture(self.model, modules, 'teacher') as capture:
            capture.image_size = image_size_of(inside)
            self._run(self.model, prepared, samples, modules)
        if self._padding is not None and prepared is not inside:
            height, width = inside.shape[-2:]
            self._cut(capture, tuple(prepared.shape[-2:]), (height, width))
        return capture

    @torch.no_grad()
    def call(self, inputs: Any, samples: Any, function: Callable[[nn.Module, Any], Any]) -> Any:
        """What ``function(model, prepared)`` returns for the student's processed batch as the teacher is given it."""
        prepared = self._prepare(inputs, samples)
        return function(self.model, prepared if self._padding is None else self._padding(prepared))

    def _cut(self, capture: Capture, padded: tuple[int, ...], inside: tuple[int, int]) -> None:
        """Take off the outputs what padding added: images of ``inside`` pixels were given as ``padded`` ones."""
        assert self._padding is not None
        cut = functools.partial(self._padding.cut, padded=padded, inside=inside)
        for path, calls in capture.calls.items():
            # (B, heads, N, N) attention is no map, whatever N is.
            if path not in capture.attention:
                capture.calls[path] = [replace(call, output=map_tensors(call.output, cut)) for call in calls]

    def tap(self, tap: Tap) -> Tap:
        """The tap that is meant by a name, see `Teacher.tap`."""
        if self._resolve is not None:
            return self._resolve(self.model, tap, 'teacher')
        return tap.means(self.head, index=tap.index) if tap.module == 'head' and self.head else tap

    def expect(self, needs: Sequence[tuple[Tap, type[Form] | None]]) -> None:
        """Nothing, for one that computes what is tapped anyway."""

    def begin(self, student: nn.Module, host: Host) -> None:
        """Nothing, for one that does not depend on the student."""

    def after_step(self) -> None:
        """Nothing, for one that does not change."""

    def state(self) -> dict[str, Tensor]:
        """Nothing, where ``checkpoint`` says it all."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing was saved."""
