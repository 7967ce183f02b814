"""What terms are built for the features at hand: adapters of both sides, and losses with parts of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from kd_plugins.adapters import adapt, describe_adapter
from kd_plugins.distiller.adapting import build_adapter
from kd_plugins.distiller.bank import AdapterBank
from kd_plugins.distiller.matching import Batch
from kd_plugins.distiller.summary import count
from kd_plugins.distiller.terms import Resolver, Term
from kd_plugins.errors import DistillError
from kd_plugins.losses.base import Extras

Pairs = Sequence[tuple[Tensor, Tensor]]


class Parts:
    """The parts of every term, one adapter (and one loss, where it has parts of its own) for each level.

    Args:
        bank: Where those go that have something to train.
        resolve: Finds adapters that are not ours.
    """

    def __init__(self, bank: AdapterBank, resolve: Resolver | None = None) -> None:
        self.bank, self._resolve = bank, resolve
        self._free: dict[str, nn.ModuleDict] = {}
        self._theirs: dict[str, nn.ModuleList] = {}

    def __contains__(self, term: Term) -> bool:
        return term.name in self._free or term.name in self.bank._modules

    # ------------------------------------------------------------------ building
    def build(self, term: Term, pairs: Pairs, batch: Batch, device: torch.device) -> None:
        """Build what a term needs for the tensors that it compares, per level; see `Matching.tensors`.

        Raises:
            DistillError: There is no such adapter, it does not fit, or the teacher's side would be trained.
        """
        adapters: list[nn.Module] = []
        theirs: list[nn.Module] = []
        taught: list[Tensor] = []
        size, teacher_size = batch.student.image_size, batch.teachers[term.teacher.owner].image_size
        for student, teacher in pairs:
            adapter = build_adapter(
                term.teacher_adapter, teacher, student, 'teacher_adapter', self._resolve, image_size=teacher_size
            )
            theirs.append(_Identity() if adapter is None else adapter.to(teacher.device))
            if trainable(theirs[-1]):
                raise DistillError(
                    'teacher_adapter has parameters to train, with which teacher and student could agree on anything; '
                    "take one without, e.g. dict(type='ChannelNorm')."
                )
            teacher = adapt(theirs[-1], teacher, student, teacher_size)
            taught.append(teacher)
            # Some losses compare whatever they are given.
            compares = term.consumes == 'features' and not term.declared.any_grid
            adapter = build_adapter(
                term.adapter if term.projects or compares else None,
                student,
                teacher,
                'adapter',
                self._resolve,
                channels=not term.declared.any_channels,
                image_size=size,
            )
            adapters.append(_Identity() if adapter is None else adapter)
        if any(not isinstance(a, _Identity) for a in theirs):
            self._theirs[term.name] = nn.ModuleList(theirs)
        losses = None
        if term.declared.built_per_level:
            # A loss with parts of its own is built once per level, for what the adapter hands it.
            losses = nn.ModuleList([cast(Extras, term.loss).for_channels(teacher.shape[1]) for teacher in taught])
        self.keep(term, device, nn.ModuleList(adapters), losses)

    def keep(
        self,
        term: Term,
        device: torch.device,
        adapters: nn.ModuleList | None = None,
        losses: nn.ModuleList | None = None,
    ) -> None:
        """Keep what a term is made of; without adapters where it compares what it is given."""
        parts = nn.ModuleDict({'adapters': nn.ModuleList() if adapters is None else adapters})
        if isinstance(term.temperature, nn.Module):
            parts['temperature'] = term.temperature
        if losses is not None:
            parts['losses'] = losses
        elif trainable(term.loss):
            parts['loss'] = term.loss
        parts.to(device)
        if trainable(parts):
            self.bank.add_module(term.name, parts)
        else:
            self._free[term.name] = parts

    # ------------------------------------------------------------------ using
    def of(self, term: Term) -> nn.ModuleDict:
        """Everything of a term's that runs on the student's side; empty before it is built."""
        parts = self.bank._modules.get(term.name) or self._free.get(term.name, _NONE)
        assert isinstance(parts, nn.ModuleDict)
        return parts

    def bring(self, term: Term, level: int, student: Tensor, teacher: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both sides of a level as the term's adapters make them."""
        teacher = self._as_compared(term, level, student, teacher, batch)
        adapters = self._adapters(term)
        if len(adapters):
            student = adapt(adapters[level], student, teacher, batch.student.image_size)
        return student, teacher

    def loss(self, term: Term, level: int) -> nn.Module:
        """The loss of a level."""
        losses = self._losses(term)
        return term.loss if losses is None else losses[level]

    def describe(self, term: Term, pairs: Pairs, batch: Batch) -> str:
        """In words, for the summary."""
        words, losses, theirs = [], self._losses(term), self._theirs.get(term.name)
        for level, (adapter, (student, teacher)) in enumerate(zip(self._adapters(term), pairs, strict=True)):
            found = [_describe(adapter, student, self._as_compared(term, level, student, teacher, batch))]
            if losses is not None:
                own = losses[level]
                found.append(f'{type(own).__name__} {count(sum(p.numel() for p in own.parameters()))}')
            said = ', '.join(word for word in found if word != 'none') or 'none'
            words.append(said if theirs is None else f'{said}; teacher: {_describe(theirs[level], teacher, student)}')
        return '; '.join(dict.fromkeys(words)) or 'none'

    def _as_compared(self, term: Term, level: int, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """The teacher's features as the term's ``teacher_adapter`` makes them."""
        theirs = self._theirs.get(term.name)
        if theirs is None:
            return teacher
        with torch.no_grad():
            return adapt(theirs[level], teacher, student, batch.teachers[term.teacher.owner].image_size)

    def _adapters(self, term: Term) -> nn.ModuleList:
        adapters = self.of(term)['adapters']
        assert isinstance(adapters, nn.ModuleList)
        return adapters

    def _losses(self, term: Term) -> nn.ModuleList | None:
        """The losses of a term by level; None where it has one for all."""
        parts = self.of(term)
        losses = parts['losses'] if 'losses' in parts else None
        assert losses is None or isinstance(losses, nn.ModuleList)
        return losses


def trainable(module: nn.Module) -> bool:
    """Whether a module has parameters."""
    return any(True for _ in module.parameters())


class _Identity(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return student


def _describe(adapter: nn.Module, student: Tensor, teacher: Tensor) -> str:
    found = None if isinstance(adapter, _Identity) else adapter
    return describe_adapter(found, tuple(student.shape), tuple(teacher.shape))


_NONE = nn.ModuleDict({'adapters': nn.ModuleList()})
