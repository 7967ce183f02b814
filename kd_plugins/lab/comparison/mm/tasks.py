"""What a model is compared by, as its config's evaluator measures it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config

from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison.mm.logs import find_metric
from kd_plugins.lab.comparison.table import BOXES, LABEL_MAPS, Metrics
from kd_plugins.type_names import type_name


@dataclass(frozen=True)
class Task:
    """An evaluator and what it logs.

    Attributes:
        name: What recipes call the task.
        evaluator: Name of its class.
        metrics: What the models are compared by.
        logged: The end of their keys in logs, in the same order.
        whole: What the evaluator logs for a perfect result.
        silence: What it means when nothing is logged.
        measured: How the figures came about, for the note below the table.
    """

    name: str
    evaluator: str
    metrics: Metrics
    logged: tuple[str, ...]
    whole: float
    silence: float
    measured: str

    def fractions(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """A line of a log with the values of `logged` in [0, 1]."""
        return {k: v / self.whole if k.endswith(self.logged) else v for k, v in line.items()}

    def accuracy(self, line: Mapping[str, Any]) -> tuple[float, ...]:
        """The values of `metrics` in [0, 1] that an evaluation logged."""
        values = (find_metric(self.fractions(line), suffix) for suffix in self.logged)
        return tuple(self.silence if math.isnan(v) else v for v in values)


DETECTION = Task(
    name='detection',
    evaluator='CocoMetric',
    metrics=BOXES,
    logged=('bbox_mAP', 'bbox_mAP_50'),
    whole=1.0,
    silence=0.0,  # there was not a single detection
    measured='100 × COCO AP',
)
SEGMENTATION = Task(
    name='segmentation',
    evaluator='IoUMetric',
    metrics=LABEL_MAPS,
    logged=('mIoU', 'mAcc'),
    whole=100.0,
    silence=math.nan,
    measured="means over the classes of mmseg's IoU and accuracy, in %",
)
MULTI_LABEL = Task(
    name='classification',
    evaluator='MultiLabelAP',
    metrics=Metrics(('mAP', 'CF1', 'OF1'), ('map', 'cf1', 'of1')),
    logged=('mAP', 'CF1', 'OF1'),
    whole=100.0,
    silence=math.nan,
    measured='mean average precision over the classes and F1 scores, in %',
)


def classification(topk: Sequence[int] = (1, 5)) -> Task:
    """What classifiers are compared by.

    Args:
        topk: As the evaluator has it: a table has no column for what is not measured.
    """
    ks = sorted({topk} if isinstance(topk, int) else set(topk))
    return Task(
        name='classification',
        evaluator='Accuracy',
        metrics=Metrics(tuple(f'top-{k}' for k in ks), tuple(f'top{k}' for k in ks)),
        logged=tuple(f'top{k}' for k in ks),
        whole=100.0,
        silence=math.nan,
        measured='share of images whose class is among the first k guesses, in %',
    )


CLASSIFICATION = classification()


@dataclass(frozen=True)
class Evaluator:
    """The evaluator of a config.

    Attributes:
        task: What it measures.
        key: Where it stands in the config: ``'test_evaluator'``, or ``'test_evaluator.0'`` in a list.
        options: Its own config.
    """

    task: Task
    key: str
    options: Mapping[str, Any]


def find_evaluator(config: Config, where: str) -> Evaluator:
    """The evaluator in a config's ``test_evaluator`` that models are compared by.

    Args:
        config: The config.
        where: The option it came from, for error messages.

    Raises:
        DistillError: There is none.
    """
    found = config.get('test_evaluator')
    listed = isinstance(found, (list, tuple))
    for i, metric in enumerate(found if listed else [found]):
        kind = type_name(metric.get('type')) if isinstance(metric, Mapping) else None
        key = f'test_evaluator.{i}' if listed else 'test_evaluator'
        if kind == DETECTION.evaluator:
            return Evaluator(DETECTION, key, metric)
        # One that only writes files for a test server measures nothing; asked for Dice or F-scores it has no mIoU.
        if kind == SEGMENTATION.evaluator and not metric.get('format_only'):
            if 'mIoU' in metric.get('iou_metrics', ('mIoU',)):
                return Evaluator(SEGMENTATION, key, metric)
        if kind == CLASSIFICATION.evaluator:
            return Evaluator(classification(metric.get('topk', (1, 5))), key, metric)
        if kind == MULTI_LABEL.evaluator:
            return Evaluator(MULTI_LABEL, key, metric)
    raise DistillError(
        f'{where}: box mAP, mIoU, or the accuracy of a classifier is what is compared, but the config has none of '
        "test_evaluator (or val_evaluator) = dict(type='CocoMetric', metric='bbox', ...), dict(type='IoUMetric', "
        "iou_metrics=['mIoU'], ...), dict(type='kd_plugins.Accuracy') and dict(type='kd_plugins.MultiLabelAP')."
    )
