"""Where the trainable parts of a distillation live: in no module tree but their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError


class AdapterBank(nn.Module):
    """The trainable parts of a distillation, a child for every term.

    It is never a part of the student, so that the student's optimizer, EMA, DDP buckets and checkpoints stay those of
    the plain run: `AdapterOptimizer` trains it, and its state is saved under a key or in a file of its own.

    Attributes:
        marked: Terms that took part in a forward pass since the last step; None: nobody said, so all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.marked: set[str] | None = None

    def trainable(self) -> dict[str, nn.Parameter]:
        """What an optimizer has to train, by name; empty where no term has trainable parts."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def mark(self, terms: Iterable[str]) -> None:
        """Say which terms take part in this forward pass.

        Several ranks average the gradients of the same parameters. Whether one of them got a gradient may depend on
        its images; which terms are on must not: it is what the schedule says, and so the same on every rank.

        Args:
            terms: Names of children; none while the distillation is off.
        """
        self.marked = (self.marked or set()).union(terms)

    def marked_parameters(self) -> dict[str, nn.Parameter]:
        """Those of `trainable` that belong to marked terms."""
        marked = self.marked
        return {n: p for n, p in self.trainable().items() if marked is None or n.partition('.')[0] in marked}

    def unmark(self) -> None:
        """Forget which terms took part: their gradients are gone."""
        if self.marked is not None:
            self.marked = set()

    def export_state(self) -> dict[str, Tensor]:
        """Weights and buffers on the CPU by name; copies."""
        return {k: v.detach().cpu().clone() for k, v in self.state_dict().items()}

    def import_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Restore what `export_state` returned.

        Args:
            state: What it returned.
            source: Where it was saved, for the message.

        Raises:
            DistillError: The state belongs to other adapters.
        """
        own = self.state_dict()
        wrong = sorted(set(own) ^ set(state)) + [k for k in own if k in state and own[k].shape != state[k].shape]
        if wrong:
            raise DistillError(
                f'The adapters saved in {source} are not those of this config ({", ".join(wrong[:3])}); resume with '
                'the terms the run was started with, or start anew from its weights.'
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])
