"""Metrics of classifiers: top-k accuracy, and average precision of several labels per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from kd_plugins.errors import DistillError, check_keys
from kd_plugins.registry import METRICS

#: Options of MMEngine's ``BaseMetric``.
_BASE = ('collect_device', 'prefix', 'collect_dir')
#: Scores that are evaluated beside ``pred_score`` where a sample has them, and what their keys end in.
_HEADS = {'pred_score_class': '_class_head', 'pred_score_distillation': '_distillation_head'}


def _stack(samples: Sequence[Mapping[str, Any]], key: str) -> Tensor:
    """One field of all samples on the CPU: one transfer per batch, not one per image.

    Raises:
        DistillError: A sample lacks it, or a score is not a number.
    """
    for sample in samples:
        if sample.get(key) is None:
            raise DistillError(f'{_name(sample)} has no {key}, so it cannot be evaluated.')
    values = torch.stack([sample[key] for sample in samples]).cpu()
    if values.isnan().any():
        first = samples[int(values.isnan().flatten(1).any(1).nonzero()[0])]
        raise DistillError(f'{_name(first)}: {key} is NaN; the model diverged, or its weights are broken.')
    return values


def _name(sample: Mapping[str, Any]) -> str:
    return sample.get('img_path', 'A sample')


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Share of images, in %, whose class is among the k with the highest score.

    Keys: ``accuracy/top1``, ``accuracy/top5``, ...; of samples that hold the scores of a class head and of a
    distillation head apart, also ``accuracy/top1_class_head`` and ``accuracy/top1_distillation_head``. Equal scores
    are ranked as ``torch.topk`` ranks them.

    Args:
        topk: One k or several.
        per_class: Add top-1 of each class, ``accuracy/class_<name>``, and their mean ``accuracy/mean_class``, in which
            rare classes do not drown; of the classes that any image has.
        **options: Of MMEngine's ``BaseMetric``: ``prefix``, ``collect_device``, ``collect_dir``.

    Raises:
        DistillError: k is no whole number >= 1, or exceeds the number of classes; the data set is multi-label; a score
            is NaN (the image is named).
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: int | Sequence[int] = (1, 5), per_class: bool = False, **options: Any) -> None:
        check_keys(options, ['topk', 'per_class', *_BASE], 'Accuracy')
        super().__init__(**options)
        ks = topk if isinstance(topk, (tuple, list)) else [topk]
        if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ks):
            raise DistillError(f'Accuracy: topk must be whole numbers >= 1, such as (1, 5), got {topk!r}.')
        if not isinstance(per_class, bool):
            raise DistillError(f'Accuracy: per_class must be True or False, got {per_class!r}.')
        self.topk, self.per_class = tuple(sorted(set(ks))), per_class

    @property
    def dataset_meta(self) -> Mapping[str, Any] | None:
        """Metainfo of the data set, which the Runner hands over before it trains."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, meta: Mapping[str, Any] | None) -> None:
        self._dataset_meta = meta
        classes = (meta or {}).get('classes')
        if classes is not None:
            self._check_depth(self.topk[-1], len(classes))

    def _check_depth(self, depth: int, count: int) -> None:
        if depth > count:
            fits = tuple(k for k in self.topk if k <= count) or (1,)
            raise DistillError(f'Accuracy: top {depth} of {count} classes means nothing; write topk={fits}.')

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep one small number per image and head: where its class ranks."""
        for sample in data_samples:
            label = sample.get('gt_label')
            if label is not None and (label.dim() or label.is_floating_point()):
                raise DistillError(
                    f'Accuracy: {_name(sample)} may have several labels; evaluate multi-label data with '
                    "dict(type='kd_plugins.MultiLabelAP')."
                )
        labels = _stack(data_samples, 'gt_label')
        ranks = {'pred_score': self._ranks(data_samples, labels, 'pred_score', self.topk[-1])}
        for key in _HEADS.keys() & data_samples[0].keys():
            ranks[key] = self._ranks(data_samples, labels, key, 1)
        if self.per_class:
            ranks['gt_label'] = labels.tolist()
        self.results.extend(dict(zip(ranks, values, strict=True)) for values in zip(*ranks.values(), strict=True))

    def _ranks(self, samples: Sequence[Mapping[str, Any]], labels: Tensor, key: str, depth: int) -> list[int]:
        """Place of each sample's class, 0 the best; ``depth`` when it is not among so many."""
        scores = _stack(samples, key)
        count = scores.shape[1]
        self._check_depth(depth, count)
        outside = ((labels < 0) | (labels >= count)).nonzero()
        if len(outside):
            i = int(outside[0])
            raise DistillError(f'{_name(samples[i])} is of class {labels[i]}, but the model predicts {count} classes.')
        found = scores.topk(depth).indices == labels[:, None]
        return torch.where(found.any(1), found.int().argmax(1), depth).tolist()

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Accuracies in %."""
        if not results:
            raise DistillError('Accuracy: no image was evaluated.')
        ranks = np.array([r['pred_score'] for r in results])
        metrics = {f'top{k}': 100 * float((ranks < k).mean()) for k in self.topk}
        for key, ending in _HEADS.items():
            if key in results[0]:
                metrics[f'top1{ending}'] = 100 * float(np.mean([r[key] == 0 for r in results]))
        if self.per_class:
            labels = np.array([r['gt_label'] for r in results])
            names = (self.dataset_meta or {}).get('classes')
            each = {
                f'class_{label if names is None else names[label]}': 100 * float((ranks[labels == label] < 1).mean())
                for label in np.unique(labels)
            }
            metrics |= {'mean_class': float(np.mean(list(each.values()))), **each}
        return metrics


@METRICS.register_module()
class MultiLabelAP(BaseMetric):
    """Mean average precision and F1 of a multi-label classifier, in %.

    Keys: ``multi_label/mAP``, the mean over classes of scikit-learn's ``average_precision_score``;
    ``multi_label/CF1``, from precision and recall averaged over classes first, as in multi-label papers since CNN-RNN
    (Wang et al., CVPR 2016; it is not the mean of the classes' F1); ``multi_label/OF1``, over all decisions. A class
    is predicted from a probability of 0.5. Classes that no image has are left out of mAP and CF1: their recall does
    not exist.

    Args:
        **options: Of MMEngine's ``BaseMetric``: ``prefix``, ``collect_device``, ``collect_dir``.

    Raises:
        DistillError: scikit-learn is missing; the data set has one class per image, other classes than the model, or
            no label at all; a score is NaN (the image is named).
    """

    default_prefix = 'multi_label'

    def __init__(self, **options: Any) -> None:
        check_keys(options, _BASE, 'MultiLabelAP')
        super().__init__(**options)
        _average_precision()  # missing? say so now, not after an epoch

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep scores and labels of each image."""
        for sample in data_samples:
            label = sample.get('gt_label')
            if label is not None and label.dim() != 1:
                raise DistillError(
                    f'MultiLabelAP: {_name(sample)} has one class, not several labels; evaluate it with '
                    "dict(type='kd_plugins.Accuracy')."
                )
        labels, scores = _stack(data_samples, 'gt_label'), _stack(data_samples, 'pred_score')
        if labels.shape != scores.shape:
            raise DistillError(
                f'{_name(data_samples[0])} has labels of {labels.shape[1]} classes, but the model predicts '
                f'{scores.shape[1]}.'
            )
        self.results.extend(zip(scores.float().numpy(), labels.bool().numpy(), strict=True))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """mAP, CF1 and OF1 in %."""
        scores, labels = (np.stack(part) for part in zip(*results, strict=True)) if results else ([], np.zeros((0, 0)))
        present = labels.any(0)
        if not present.any():
            raise DistillError(f'MultiLabelAP: none of the {len(results)} images has a label.')
        average_precision = _average_precision()
        precisions = [average_precision(labels[:, c], scores[:, c]) for c in np.flatnonzero(present)]
        predicted = scores >= 0.5
        hits = (predicted & labels).sum(0)
        recall = hits[present] / labels.sum(0)[present]
        # A class that is never predicted makes no wrong claim, but gets no credit either.
        precision = hits[present] / predicted.sum(0)[present].clip(1)
        return {
            'mAP': 100 * float(np.mean(precisions)),
            'CF1': 100 * _f1(precision.mean(), recall.mean()),
            'OF1': 100 * _f1(hits.sum() / max(predicted.sum(), 1), hits.sum() / labels.sum()),
        }


def _f1(precision: float, recall: float) -> float:
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _average_precision() -> Any:
    try:
        from sklearn.metrics import average_precision_score
    except ImportError as error:
        raise DistillError(
            f'MultiLabelAP needs scikit-learn, which cannot be imported ({error}): pip install scikit-learn.'
        ) from error
    return average_precision_score
