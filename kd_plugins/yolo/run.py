"""One distilled run inside Ultralytics' trainer: the session on the student's criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller import Capture, Position, Session
from kd_plugins.errors import DistillError
from kd_plugins.teachers.checkpoints import load_checkpoint
from kd_plugins.teachers.pseudo import PseudoLabels
from kd_plugins.yolo.criterion import KDCriterion, plain_criterion
from kd_plugins.yolo.heads import SUPPORTED, head_path
from kd_plugins.yolo.host import UltralyticsHost

#: Columns of the terms that the short options make; of others `columns`.
COLUMNS = {'cls': 'kdcls_loss', 'box': 'kdbox_loss', 'mask': 'kdmsk_loss', 'feature': 'kdfea_loss'}
#: Column of all KD losses over the task loss, as MMEngine's hook logs it; plotted is what has ``loss`` in its name.
RATIO = 'kd_ratio'
#: Adapters and what trains them, beside last.pt.
STATE = 'kd_last.pt'
#: Largest norm of gradients in Ultralytics' trainer.
CLIP = 10.0


def columns(terms: Sequence[str]) -> dict[str, str]:
    """Columns of terms in the progress bar and in results.csv.

    Ultralytics' table has room for 10 characters, and plots what has ``loss`` in its name.

    Args:
        terms: Names; those of two branches, ``cls`` and ``cls_one2one``, share a column.
    """
    found: dict[str, str] = {}
    for name in terms:
        short = name.removesuffix('_one2one')
        if short in COLUMNS:
            found[name] = COLUMNS[short]
            continue
        letters = name.replace('_', '').lower() or 'x'
        choices = [
            letters[:3],
            *(f'{letters[:2]}{i}' for i in range(10)),
            *(f'{letters[:1]}{i:02}' for i in range(100)),
        ]
        taken = set(found.values()) | set(COLUMNS.values())
        found[name] = next(c for text in choices if (c := f'kd{text}_loss') not in taken)
    return found


def with_labels(batch: Mapping[str, Any], found: Sequence[Tensor], pseudo: PseudoLabels) -> dict[str, Any]:
    """A copy of a batch of boxes with detections added to its labels, see `Run.label`."""
    height, width = batch['img'].shape[-2:]
    scale = batch['bboxes'].new_tensor([width, height, width, height])
    centre, side = (batch['bboxes'] * scale).split(2, -1)
    corners = torch.cat([centre - side / 2, centre + side / 2], -1)
    labels = {key: [batch[key]] for key in ('cls', 'bboxes', 'batch_idx')}
    for i, rows in enumerate(found):
        rows = pseudo.missing(rows.to(corners), corners[batch['batch_idx'].to(corners.device) == i])
        low, high = rows[:, :2], rows[:, 2:4]
        labels['bboxes'].append(torch.cat([(low + high) / 2, high - low], -1) / scale)
        labels['cls'].append(rows[:, 5:])
        labels['batch_idx'].append(torch.full_like(rows[:, 0], i))
    merged = {key: torch.cat([v.to(parts[0]) for v in parts]) for key, parts in labels.items()}
    # The criterion expects them image by image.
    order = merged['batch_idx'].argsort(stable=True)
    return {**batch, **{key: values[order] for key, values in merged.items()}}


class Run:
    """Adds the KD losses of a session to the task loss of an Ultralytics student, between attaching and detaching.

    Args:
        session: The checked session.
        host: Its host.
    """

    def __init__(self, session: Session, host: UltralyticsHost) -> None:
        self.session, self.host = session, host
        self.student = session.student
        self.columns = columns(list(session.terms))
        self.batches, self.batch = 1, 0
        self._head = head_path(self.student)
        self._capture: Capture | None = None
        self._attached = False
        self._states: dict[int, dict[str, Any]] = {}

    def __deepcopy__(self, memo: dict) -> Run:
        return self

    # ------------------------------------------------------------------ attaching
    def attach(self, trainer: Any) -> None:
        """Replace the student's criterion and follow its optimizer; what a resumed run needs is restored.

        Raises:
            DistillError: The criterion cannot be replaced, or the state of the adapters is missing.
        """
        # A resumed run already has one, whose decay has advanced.
        criterion = plain_criterion(getattr(self.student, 'criterion', None))
        if criterion is None:
            criterion = self.student.init_criterion()
        if isinstance(criterion, nn.Module):
            raise DistillError(
                f'The criterion {type(criterion).__name__} is a module, which this callback cannot wrap; supported '
                f'are {SUPPORTED} with the criteria of Ultralytics.'
            )
        self.attach_optimizer(trainer)
        if trainer.resume and self.session.state():
            self._restore(trainer)
        self.student.criterion = KDCriterion(criterion, self.add, self.label)
        self._attached = True

    def attach_optimizer(self, trainer: Any) -> None:
        """Let the adapters step with the trainer's optimizer, which it builds anew after an out-of-memory error."""
        if self.session.follows is trainer.optimizer:
            return
        before = self.session.state() if self.session.follows is not None else {}
        self.session.attach(trainer.optimizer, clip=CLIP, scaler=lambda: getattr(trainer, 'scaler', None))
        if before:
            self.session.load_state(before, 'memory')

    def detach(self) -> None:
        """Give the student its criterion back."""
        self.close()
        if self._attached:
            self.student.criterion = plain_criterion(getattr(self.student, 'criterion', None))
        self._attached = False
        self.session.detach()

    # ------------------------------------------------------------------ every batch
    def begin_batch(self, position: Position) -> str | None:
        """A batch begins: record what the student computes at the taps other than its head.

        Returns:
            A sentence for the log, see `Session.begin_iteration`.
        """
        released = self.session.begin_iteration(position)
        self.close()
        if self.session.active:
            capture = self.session.capture(known=[self._head])
            if capture.modules:
                self._capture = capture.open()
        return released

    def close(self) -> None:
        """Stop recording."""
        if self._capture is not None:
            self._capture.close()
        self._capture = None

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch as the task loss is to see it: with what the teachers detect, where the run has pseudo-labels.

        Args:
            batch: With ``img`` ``(B, C, H, W)``, and labels ``cls`` ``(n, 1)``, ``bboxes`` ``(n, 4)`` (centre, width
                and height, as fractions of the image's) and ``batch_idx`` ``(n,)``.

        Returns:
            The batch itself where nothing is added, in validation for one.
        """
        if not self.student.training or not torch.is_grad_enabled():
            return batch
        found = self.session.pseudo_labels(batch['img'], batch)
        return batch if found is None else with_labels(batch, found, self.session.pseudo)

    def add(self, loss: Tensor, items: Mapping[str, Tensor], preds: Any, batch: Mapping[str, Any]) -> tuple:
        """The task loss with the KD losses, and the logged items with the KD columns.

        Args:
            loss: The criterion's loss: ``(n,)`` parts times the batch size, or a scalar mean for classify.
            items: What is logged.
            preds: What the student returned.
            batch: With ``img`` ``(B, C, H, W)``, as the student saw it.

        Returns:
            ``(loss, items)``. In validation as they were given; while KD is off, with columns of 0.
        """
        # The second is torch's own state: a validation of this very model (without EMA) has no gradient.
        if not self.student.training or not torch.is_grad_enabled():
            return loss, items
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.close()
        if not self.session.active:
            self.session.bank.mark(())
            zero = torch.zeros((), device=loss.device)
            # The very same tensor: with all weights 0 the run is bit by bit the plain one.
            return loss, {**items, **dict.fromkeys((*self.columns.values(), RATIO), zero)}
        capture = self.session.capture(known=self.session.student_modules) if capture is None else capture
        capture.put(self._head, preds, training=True, module=self.student.get_submodule(self._head))
        scale = self.host.task.scale(batch['img'])
        # Not where nobody asks: each operation is a launch on a GPU.
        share = loss.detach().sum() / scale if self.session.needs_task else None
        values = self.session.losses(capture, batch['img'], batch, share)
        kd = torch.stack([v.float() for v in values.values()]).sum() * scale
        logged: dict[str, Tensor] = {}
        for name, column in self.columns.items():
            value = values[f'loss_kd_{name}'].detach()
            logged[column] = logged[column] + value if column in logged else value
        task, taught = loss.detach().sum(), kd.detach()
        self.session.refuse_nan(task, values)
        self.session.balance.add(task, taught)
        if self.session.alpha is not None:
            loss, task = (v * (1 - self.session.alpha) for v in (loss, task))
        self.session.history.add(values, task, taught)
        # Finite where there is nothing but KD.
        logged[RATIO] = taught / task.clamp(min=1e-6)
        loss = torch.cat([loss, kd.to(loss.dtype).view(1)]) if loss.dim() else loss + kd
        return loss, {**items, **logged}

    # ------------------------------------------------------------------ adapters over the epochs
    def begin_epoch(self, trainer: Any) -> None:
        """An epoch begins; one that is done again (NaN recovery) begins with the adapters that it began with."""
        self.batch, self.batches = 0, max(len(trainer.train_loader), 1)
        self.attach_optimizer(trainer)
        self.session.balance.ratio()
        if trainer.epoch in self._states and trainer.epoch - 1 in self._states:
            self.session.load_state(self._states[trainer.epoch - 1], 'memory')

    def end_epoch(self, trainer: Any, write: bool) -> None:
        """Keep the adapters of the epoch, of which last.pt is about to be written; and of the one before, in case the
        process ends in between."""
        self.close()
        state = self.session.state()
        if not state:
            return
        self._states = {e: s for e, s in self._states.items() if e == trainer.epoch - 1}
        self._states[trainer.epoch] = state
        if write and trainer.args.save:
            path = Path(trainer.wdir) / STATE
            partial = path.with_suffix('.tmp')
            torch.save({'epochs': self._states}, partial)
            partial.replace(path)

    def _restore(self, trainer: Any) -> None:
        # Beside the checkpoint that is resumed, which a run that was moved no longer has in its own folder.
        folders = [Path(str(trainer.args.model)).parent, Path(trainer.wdir)]
        path = next((f / STATE for f in folders if (f / STATE).is_file()), folders[0] / STATE)
        if not path.is_file():
            raise DistillError(
                f'resume needs the adapters of the run, and {str(path)!r} does not exist, so it was not written by '
                'this distilled run; restore the file, or start a new run from the weights.'
            )
        saved = load_checkpoint(str(path), 'the adapters')
        epoch = trainer.start_epoch - 1
        states = saved.get('epochs', {}) if isinstance(saved, Mapping) else {}
        if epoch not in states:
            raise DistillError(
                f'{str(path)!r} holds the adapters of epochs {sorted(states)}, and last.pt is of epoch {epoch}: they '
                'are not of the same run; restore the file, or start a new run from the weights.'
            )
        self._states = {epoch: states[epoch]}
        self.session.load_state(states[epoch], str(path))


def position_of(trainer: Any, epoch: int, batches: int, batch: int = 0) -> Position:
    """Where the next iteration is.

    Args:
        trainer: It may change the number of epochs on the way.
        epoch: The current one.
        batches: Of an epoch.
        batch: Of the current one.
    """
    batch, epochs = min(batch, batches), max(trainer.epochs, 1)
    return Position(epoch * batches + batch, epochs * batches, epoch, epoch + batch / batches, epochs)
