"""Scores Ultralytics' models on some validation images with the run's own validator, without touching the run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller import Capture, Session, Tap, find_module
from kd_plugins.distiller.ending import numbers_of
from kd_plugins.distiller.matching import Batch
from kd_plugins.distiller.scoring import Measured, box_confusion, label_confusion, spread
from kd_plugins.errors import DistillError
from kd_plugins.predictions import Classes, ClassPredictions, DensePredictions, readable
from kd_plugins.teachers.pseudo import PseudoLabels
from kd_plugins.yolo.heads import head_of
from kd_plugins.yolo.host import UltralyticsHost

#: What Ultralytics compares epochs by.
MAIN = 'fitness'
#: Lowest score of a detection that counts, as in Ultralytics' validation.
_LEAST = 0.001


class UltralyticsScorer:
    """The validation of a trainer on some of its images; see `kd_plugins.distiller.scoring.Scorer`.

    Args:
        trainer: A trainer whose training is about to start, with a validator.
        session: The checked session.
        host: Its host.
        wanted: How many images.
    """

    def __init__(self, trainer: Any, session: Session, host: UltralyticsHost, wanted: int) -> None:
        self.trainer, self.session, self.host = trainer, session, host
        self.dataset = trainer.test_loader.dataset
        self.total = len(self.dataset)
        self.indices = spread(self.total, wanted)
        self.images = len(self.indices)

    def measure(self, teachers: Mapping[str, Classes], student: bool) -> dict[str | None, Measured]:
        """See `kd_plugins.distiller.scoring.Scorer`."""
        model = copy.deepcopy(self.session.student).float().eval()
        model.criterion = None
        sides: list[str | None] = [*teachers, *([None] if student else [])]
        validators = {side: self._validator(model) for side in sides}
        number = len(model.names)
        counted: dict[str | None, list[Tensor]] = {side: [] for side in sides}
        for raw in self._batches():
            for side in sides:
                validator = validators[side]
                batch = validator.preprocess({k: copy.copy(v) for k, v in raw.items()})
                if side is None:
                    preds = validator.postprocess(model(batch['img']))
                else:
                    preds = self._taught(side, teachers[side], validator, model, batch)
                counted[side] += _taken(preds, batch, number)
                validator.update_metrics(preds, batch)
        return {side: _close(validators[side], counted[side], number) for side in sides}

    def _validator(self, model: nn.Module) -> Any:
        """A copy of the run's validator that neither writes nor plots."""
        own = copy.copy(self.trainer.validator)
        own.metrics, own.args = copy.deepcopy(own.metrics), copy.copy(own.args)
        own.args.plots = own.args.save_json = own.args.save_txt = own.args.half = False
        own.args.quantize = None
        own.device, own.data, own.training = next(model.parameters()).device, self.trainer.data, True
        own.callbacks, own.speed = {}, dict(own.speed)
        own.init_metrics(model)
        return own

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Items of one size each, as the validation set gives them: its batches may have sizes of their own."""
        size = getattr(self.trainer.test_loader, 'batch_size', None) or 1
        collate = self.trainer.test_loader.collate_fn or torch.utils.data.default_collate
        items: list[Any] = []
        for index in self.indices:
            item = self.dataset[index]
            if items and (len(items) == size or item['img'].shape != items[0]['img'].shape):
                yield collate(items)
                items = []
            items.append(item)
        yield collate(items)

    def _taught(self, name: str, classes: Classes, validator: Any, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """What a teacher predicts, as the validator has it, with the student's classes."""
        teacher: Any = self.session.teachers[name]
        images = batch['img']
        teacher.to(images)
        head = find_module(teacher.model, teacher.head, 'teacher')
        if teacher.kind == 'ultralytics' and not readable(head, ClassPredictions):
            return teacher.call(images, batch, lambda net, x: _decoded(net, x, validator, classes))
        form = next((f for f in (ClassPredictions, DensePredictions) if readable(head, f)), None)
        if form is None:
            raise DistillError('what it predicts cannot be brought to the validator of this run')
        capture = teacher.outputs(images, batch, [teacher.head])
        whole = Batch(Capture(self.session.student, (), 'student'), {name: capture})
        found = self.session.matching.read('teacher', capture, Tap(teacher.head), form, whole)
        if isinstance(found, ClassPredictions):
            return _classified(found, classes, len(model.names))
        height, width = images.shape[-2:]
        rows = PseudoLabels(score=_LEAST).detect(found, classes, (height, width))
        return [{'bboxes': r[:, :4], 'conf': r[:, 4], 'cls': r[:, 5], 'extra': r[:, 6:]} for r in rows]


def _close(validator: Any, counted: Sequence[Tensor], number: int) -> Measured:
    metrics = numbers_of(validator.get_stats(), MAIN)
    confusion = torch.stack(list(counted)).sum(0) if counted else None
    return Measured(metrics, True, confusion, 0 if confusion is None else int(confusion[:, :number].sum()))


# ---------------------------------------------------------------------- predictions
def _decoded(net: nn.Module, images: Tensor, validator: Any, classes: Classes) -> list[dict[str, Tensor]]:
    """Detections of a teacher of Ultralytics, whose classes are numbered as the student's."""
    head = head_of(net)
    theirs = copy.copy(validator)
    theirs.nc, theirs.end2end = head.nc, getattr(net, 'end2end', False)
    with _as_in_inference(head):
        preds = theirs.postprocess(net(images))
    if classes is None:
        return preds
    numbers = torch.full((head.nc,), -1.0, device=images.device)
    numbers[list(classes[1])] = torch.as_tensor(list(classes[0]), dtype=torch.float32, device=images.device)
    mapped = [{**pred, 'cls': numbers[pred['cls'].long()]} for pred in preds]
    return [{key: value[pred['cls'] >= 0] for key, value in pred.items()} for pred in mapped]


@contextmanager
def _as_in_inference(head: nn.Module) -> Iterator[None]:
    """A teacher's head returns what it computes before decoding; here what its class returns."""
    raw = vars(head).pop('forward', None)
    try:
        yield
    finally:
        if raw is not None:
            head.forward = raw


def _classified(found: ClassPredictions, classes: Classes, number: int) -> Tensor:
    logits = found.logits.float()
    if classes is None:
        return logits
    full = logits.new_full((len(logits), number), -torch.inf)
    full[:, list(classes[0])] = logits[:, list(classes[1])]
    return full


# ---------------------------------------------------------------------- what was taken for what
def _taken(preds: Any, batch: Mapping[str, Any], number: int) -> list[Tensor]:
    """Counts of a batch, see `kd_plugins.distiller.scoring.Measured`; none where boxes are rotated."""
    if isinstance(preds, Tensor):
        return [label_confusion(batch['cls'], preds.argmax(1), number)]
    if batch['bboxes'].shape[-1] != 4:
        return []
    height, width = batch['img'].shape[-2:]
    centre, side = (batch['bboxes'] * batch['bboxes'].new_tensor([width, height] * 2)).split(2, -1)
    corners, labels = torch.cat([centre - side / 2, centre + side / 2], -1), batch['cls'].view(-1)
    counted = []
    for i, pred in enumerate(preds):
        here = batch['batch_idx'] == i
        counted.append(box_confusion(corners[here], labels[here], pred['bboxes'], pred['conf'], pred['cls'], number))
    return counted
