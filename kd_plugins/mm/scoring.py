"""Scores models of the MM family on some validation images with the run's own evaluator, without touching the run."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import DumpResults
from mmengine.model import BaseModel
from mmengine.runner.amp import autocast
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_plugins.distiller import Capture, Session, Tap, find_module
from kd_plugins.distiller.matching import Batch
from kd_plugins.distiller.scoring import REGIONS, Measured, box_confusion, label_confusion, spread
from kd_plugins.errors import DistillError
from kd_plugins.mm.copies import private_copy
from kd_plugins.mm.ending import main_metric
from kd_plugins.mm.example import untouched_messages
from kd_plugins.mm.host import MMHost
from kd_plugins.predictions import Classes, ClassPredictions, DensePredictions, readable
from kd_plugins.teachers.pseudo import PseudoLabels

#: Where metrics write files besides.
_FILES = ('outfile_prefix', 'output_dir')
#: What is not likely at all is no detection: mean average precision counts them down to this.
_LEAST = 0.01


class MMScorer:
    """The validation of a Runner on some of its images; see `kd_plugins.distiller.scoring.Scorer`.

    Args:
        runner: A Runner whose training is about to start, with a validation loop.
        session: The checked session.
        host: Its host.
        wanted: How many images.
    """

    def __init__(self, runner: Any, session: Session, host: MMHost, wanted: int) -> None:
        self.runner, self.session, self.host = runner, session, host
        self.loop = runner.val_loop
        self.total = len(self.loop.dataloader.dataset)
        self.indices = spread(self.total, wanted)
        self.images = len(self.indices)

    def measure(self, teachers: Mapping[str, Classes], student: bool) -> dict[str | None, Measured]:
        """See `kd_plugins.distiller.scoring.Scorer`."""
        copied = copy.deepcopy(self.session.student).eval()
        sides: list[str | None] = [*teachers, *([None] if student else [])]
        books = {side: _Book(self.loop.evaluator, self._number(copied)) for side in sides}
        with untouched_messages(), _quiet(self.runner.logger):
            for raw, inputs, samples in self._batches(copied):
                for side in sides:
                    own = copy.deepcopy(samples)
                    with autocast(enabled=getattr(self.loop, 'fp16', False)):
                        if side is None:
                            made = copied(inputs, own, mode='predict')
                        else:
                            made = self._taught(side, teachers[side], copied, inputs, own)
                    books[side].add(raw, samples, made)
            return {side: self._close(book) for side, book in books.items()}

    def _number(self, model: nn.Module) -> int:
        meta = getattr(self.loop.evaluator, 'dataset_meta', None) or {}
        return len(meta.get('classes') or ()) or 1

    def _batches(self, model: Any) -> Iterator[tuple[Any, Tensor, Any]]:
        loader = self.loop.dataloader
        dataset = private_copy(loader.dataset)
        size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None) or 1
        for start in range(0, len(self.indices), size):
            raw = loader.collate_fn([dataset[i] for i in self.indices[start : start + size]])
            data = model.data_preprocessor(copy.deepcopy(raw), False)
            yield raw, data['inputs'], data['data_samples']

    def _taught(self, name: str, classes: Classes, student: Any, inputs: Tensor, samples: Any) -> Any:
        """What a teacher predicts, as data samples whose classes are the student's."""
        teacher: Any = self.session.teachers[name]
        teacher.to(next(student.parameters()))
        if isinstance(teacher.model, BaseModel) and not readable(_head(teacher), ClassPredictions):
            return teacher.call(inputs, samples, lambda model, x: _predicted(model, x, inputs, samples, classes))
        found = self._read(name, inputs, samples)
        if isinstance(found, ClassPredictions):
            return _classified(found, classes, student, samples)
        if isinstance(found, DensePredictions):
            return _detected(found, classes, inputs, samples)
        raise DistillError('what it predicts cannot be brought to the evaluator of this run')

    def _read(self, name: str, inputs: Tensor, samples: Any) -> Any:
        teacher = self.session.teachers[name]
        head = _head(teacher)
        form = next((f for f in (ClassPredictions, DensePredictions) if readable(head, f)), None)
        if form is None:
            return None
        capture = teacher.outputs(self.host.for_teacher(inputs), samples, [teacher.head])
        batch = Batch(Capture(self.session.student, (), 'student'), {name: capture})
        return self.session.matching.read('teacher', capture, Tap(teacher.head), form, batch)

    def _close(self, book: _Book) -> Measured:
        metrics = book.metrics()
        if not metrics:
            # What has detected nothing is not measured.
            return Measured({}, None, book.confusion, book.samples)
        main, greater = main_metric(self.runner, metrics, self.host.task.metrics)
        numbers = {main: float(metrics[main])}
        return Measured(numbers, greater, book.confusion, book.samples)


def _head(teacher: Any) -> nn.Module:
    return find_module(teacher.model, teacher.head, 'teacher') if teacher.head else nn.Identity()


class _Book:
    """Copies of an evaluator's metrics for one model, and what it took for what."""

    def __init__(self, evaluator: Any, number: int) -> None:
        self._number, self._images = number, []
        self.confusion: Tensor | None = None
        self.samples = 0
        self._metrics = []
        for metric in evaluator.metrics:
            if isinstance(metric, DumpResults) or getattr(metric, 'format_only', False):
                continue
            # Not deep: a metric may hold all annotations of a data set.
            own = copy.copy(metric)
            own.results = []
            for name in _FILES:
                if getattr(own, name, None) is not None:
                    setattr(own, name, None)
            self._metrics.append(own)
        if not self._metrics:
            raise DistillError('the evaluator of this run only writes files')

    def add(self, raw: Any, truth: Sequence[Any], made: Sequence[Any]) -> None:
        plain = [sample.to_dict() for sample in made]
        for metric in self._metrics:
            metric.process(raw, plain)
        self._images += [sample.get('img_id') for sample in plain]
        for there, found in zip(truth, made, strict=True):
            for count in (_labelled, _segmented, _boxed):
                counted = count(there, found, self._number)
                if counted is not None:
                    self.confusion = counted[0] if self.confusion is None else self.confusion + counted[0]
                    self.samples += counted[1]
                    break

    def metrics(self) -> dict[str, Any]:
        found = {}
        for metric in self._metrics:
            if hasattr(metric, 'img_ids'):
                # Images that the model did not see are no misses of it.
                metric.img_ids = self._images
            prefix = f'{metric.prefix}/' if getattr(metric, 'prefix', None) else ''
            # Not `evaluate`, which waits for other processes.
            found.update({f'{prefix}{key}': value for key, value in metric.compute_metrics(metric.results).items()})
        return found


# ---------------------------------------------------------------------- predictions
def _predicted(model: Any, prepared: Tensor, inputs: Tensor, samples: Any, classes: Classes) -> Any:
    """By a model of the MM family, whose classes are numbered as the student's."""
    factors = [a / b for a, b in zip(prepared.shape[-2:], inputs.shape[-2:], strict=True)]
    for sample in samples:
        if factors != [1.0, 1.0] and 'scale_factor' in sample:
            # It sees another resolution, of which its boxes are brought back to the file's.
            width, height = sample.scale_factor[:2]
            shape = tuple(round(side * f) for side, f in zip(sample.img_shape, factors, strict=False))
            sample.set_metainfo(dict(scale_factor=(width * factors[1], height * factors[0]), img_shape=shape))
    made = model(prepared, samples, mode='predict')
    if classes is None:
        return made
    number = max(max(classes[0]), max(classes[1])) + 1
    numbers = torch.full((number,), -1)
    numbers[list(classes[1])] = torch.as_tensor(list(classes[0]))
    for sample in made:
        found = sample.get('pred_instances')
        if found is not None:
            mapped = numbers.to(found.labels.device)[found.labels.clamp(max=number - 1)]
            known = (mapped >= 0) & (found.labels < number)
            found.labels = mapped
            sample.pred_instances = found[known]
        logits = sample.get('seg_logits')
        if logits is not None:
            best = logits.data[list(classes[1])].argmax(0, keepdim=True)
            sample.pred_sem_seg.data = torch.as_tensor(list(classes[0]), device=best.device)[best]
    return made


def _classified(found: ClassPredictions, classes: Classes, student: Any, samples: Any) -> Any:
    logits = found.logits.float()
    if classes is not None:
        full = logits.new_full((len(logits), student.logits.num_classes), -torch.inf)
        full[:, list(classes[0])] = logits[:, list(classes[1])]
        logits = full
    scores = logits.sigmoid() if found.activation == 'sigmoid' else logits.softmax(-1)
    for sample, score in zip(samples, scores, strict=True):
        sample.pred_score = score
    return samples


def _detected(found: DensePredictions, classes: Classes, inputs: Tensor, samples: Any) -> Any:
    height, width = inputs.shape[-2:]
    for sample, rows in zip(samples, PseudoLabels(score=_LEAST).detect(found, classes, (height, width)), strict=True):
        scale = rows.new_tensor(sample.scale_factor[:2]).repeat(2)
        sample.pred_instances = InstanceData(bboxes=rows[:, :4] / scale, scores=rows[:, 4], labels=rows[:, 5].long())
    return samples


# ---------------------------------------------------------------------- what was taken for what
def _labelled(truth: Any, made: Any, number: int) -> tuple[Tensor, int] | None:
    label, score = truth.get('gt_label'), made.get('pred_score')
    if not isinstance(label, Tensor) or score is None or label.numel() != 1 or label.is_floating_point():
        return None
    return label_confusion(label, score.argmax(-1, keepdim=True).to(label.device), number), 1


def _segmented(truth: Any, made: Any, number: int) -> tuple[Tensor, int] | None:
    there, found = truth.get('gt_sem_seg'), made.get('pred_sem_seg')
    if there is None or found is None or there.data.shape != found.data.shape:
        return None
    return label_confusion(there.data, found.data.to(there.data.device), number), REGIONS


def _boxed(truth: Any, made: Any, number: int) -> tuple[Tensor, int] | None:
    there, found = truth.get('gt_instances'), made.get('pred_instances')
    if there is None or found is None or 'bboxes' not in there or 'bboxes' not in found:
        return None
    boxes, detected = (getattr(b, 'tensor', b) for b in (there.bboxes, found.bboxes))
    if boxes.shape[-1] != 4 or detected.shape[-1] != 4:
        return None
    counted = box_confusion(boxes, there.labels, detected, found.scores, found.labels, number)
    return counted, int(counted[:, :number].sum())


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Metrics print their tables, which belong to the validation of the run."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(nothing)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeFilter(nothing)
