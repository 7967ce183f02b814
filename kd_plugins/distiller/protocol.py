"""What the engine asks of a teacher; the kinds of teachers are written in `kd_plugins.teachers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kd_plugins.distiller.host import Host
from kd_plugins.distiller.taps import Capture, Tap
from kd_plugins.predictions import Classes, DensePredictions, Form


class Teacher(Protocol):
    """A source of what the student is to learn.

    Whatever leads to a teacher is copied and pickled without it: `copy.deepcopy` of one returns the teacher itself and
    a pickle leaves it out, so that it never enters a state dict, an optimizer, an EMA copy or DDP's buckets.

    Attributes:
        model: The network, whose modules are tapped. Never in the student's module tree.
        name: For the summary.
        mode: For the summary: how it changes during the run, e.g. ``'frozen, evaluation mode'``.
        checkpoint: For the summary: where the weights come from.
        normalization: For the summary: how it is given its images.
        classes: Names of the classes it knows in the order of its outputs, or None when unknown.
        num_classes: How many it predicts, or None when unknown.
        own_classes: Whether its classes are its own; False: it is made from the student and has those.
        head: Path of the module whose output is what it predicts.
        kind: Key of the ``teacher`` mapping that it came from, ``''`` for others.
        channels: Image channels it takes, or None when unknown.
    """

    model: nn.Module
    name: str
    mode: str
    checkpoint: str
    normalization: str
    classes: tuple[str, ...] | None
    num_classes: int | None
    own_classes: bool
    head: str
    kind: str
    channels: int | None

    @property
    def parameters_count(self) -> int:
        """Number of parameters."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        ...

    def to(self, like: Tensor) -> Teacher:
        """Follow the device of the student's inputs, and their dtype where the student itself runs in it."""
        ...

    def tap(self, tap: Tap) -> Tap:
        """The tap that is meant by a name: ``head``, ``neck``, ``backbone``, ``logits``, ``stages[i]``, or a path.

        Raises:
            DistillError: It has no such thing.
        """
        ...

    def outputs(self, inputs: Any, samples: Any, modules: Iterable[str]) -> Capture:
        """What its modules compute for the student's processed batch, without gradients.

        Args:
            inputs: ``(B, C, H, W)`` the batch as the student sees it.
            samples: What the framework hands on with it (data samples, labels), or None.
            modules: Dotted paths of the modules that must run.
        """
        ...

    def begin(self, student: nn.Module, host: Host) -> None:
        """The run is about to start (or to be resumed): called once, before the taps are looked up.

        Args:
            student: The plain student with the weights that it starts from.
            host: How models like the student are run and tapped, for teachers that are made from it.
        """
        ...

    def expect(self, needs: Sequence[tuple[Tap, type[Form] | None]]) -> None:
        """What will be asked of it, so that it can leave out the rest: taps, and the forms they are read into."""
        ...

    def after_step(self) -> None:
        """The student's optimizer has stepped."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """What a resumed run needs that cannot be loaded from ``checkpoint`` again; empty for most."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        ...


class Detector(Protocol):
    """Turns the predictions of a teacher into labels that a host adds to those of a batch."""

    def detect(self, predictions: DensePredictions, classes: Classes, size: tuple[int, int]) -> list[Tensor]:
        """Rows ``(n, 6)`` for every image: box ``x1, y1, x2, y2`` in pixels, score, and class of the student.

        Args:
            predictions: The teacher's.
            classes: ``(student_index, teacher_index)`` of the classes that both know; None: all, in the same order.
            size: ``(H, W)`` of the images in pixels.
        """
