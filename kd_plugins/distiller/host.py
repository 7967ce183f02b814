"""What the engine asks of a framework: everything that it cannot know about a model, a batch or a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from kd_plugins.distiller.taps import Tap, find_module


class Host:
    """A framework as the engine sees it; as it stands here, a plain training loop of PyTorch.

    A subclass is all that a new zoo needs, see ``examples/plain_torch.py`` for the rest of the loop.

    Attributes:
        counts: Asked, once and only by losses that need it, for the number of training images of each class of the
            student; None where that is not known.
    """

    counts: Callable[[], Sequence[int] | None] | None = None

    def tap(self, student: nn.Module, tap: Tap) -> Tap:
        """The tap that is meant by a name: ``head``, ``neck``, ``backbone``, ``logits``, ``stages[i]``, or a path.

        Raises:
            DistillError: The student has no such thing.
        """
        return tap

    def part(self, student: nn.Module, name: str) -> list[nn.Module]:
        """The modules of a part of the student: ``backbone``, ``neck``, ``head``, or what a path names.

        Raises:
            DistillError: It has no such part.
        """
        return [find_module(student, name, 'student')]

    def head(self, student: nn.Module) -> str:
        """Path of the module whose output is what the student predicts, ``''`` when it has none."""
        return ''

    def run(self, student: nn.Module, inputs: Any, samples: Any, modules: Sequence[str]) -> None:
        """Run the student just far enough for the modules of these paths; without losses and without decoding."""
        student(inputs)

    def targets(self, inputs: Any, samples: Any) -> Tensor | None:
        """Labels of a batch as the student numbers its classes, None when there are none.

        Args:
            inputs: The batch.
            samples: What the framework hands on with it; None in a dry run without a real batch.
        """
        return None

    def for_teacher(self, inputs: Any) -> Any:
        """The batch in the precision in which a teacher is to see it; teachers follow it."""
        return inputs

    def factor(self, term_tap: Tap) -> float:
        """What the framework multiplies its own loss at a tap by at the moment (of a branch, for one)."""
        return 1.0

    def size_option(self, side: str) -> str:
        """How a user says what size of images a model takes, where it takes one only."""
        return 'the size of the images' if side == 'student' else 'teacher.input_size=(height, width)'

    def missed(self, student: nn.Module) -> str:
        """Why the KD losses may not have been asked for, as ``... <this>; nothing was distilled``."""
        return 'session.losses was never called'
