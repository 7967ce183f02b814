"""Pseudo-labels in the data samples of mmdet."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.teachers.pseudo import PseudoLabels

#: What a detection gives a label for.
_FIELDS = {'bboxes', 'labels'}


def with_labels(samples: Sequence[Any], found: Sequence[Tensor], pseudo: PseudoLabels) -> list[Any]:
    """Copies of data samples with detections added to their labels.

    Args:
        samples: With ``gt_instances`` (``bboxes`` ``(m, 4)`` in pixels of the network input, ``labels`` ``(m,)``) and
            perhaps ``ignored_instances``, in whose place nothing is added either.
        found: Per image ``(n, 6)``, see `PseudoLabels.detect`.
        pseudo: What is added.
    """
    labelled = []
    for sample, rows in zip(samples, found, strict=True):
        known = sample.gt_instances
        boxes = _tensor(known.bboxes)
        ignored = getattr(sample, 'ignored_instances', None)
        if ignored is not None and len(ignored):
            rows = pseudo.missing(rows, _tensor(ignored.bboxes))
        rows = pseudo.missing(rows.to(boxes), boxes)
        # The data set may keep its sample.
        sample = copy.copy(sample)
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([boxes, rows[:, :4]]), labels=torch.cat([known.labels, rows[:, 5].to(known.labels)])
        )
        labelled.append(sample)
    return labelled


def _tensor(boxes: Any) -> Tensor:
    """The numbers of boxes, which mmdet may keep in a class of its own."""
    return boxes if isinstance(boxes, Tensor) else boxes.tensor


def refuse_unlabelled(samples: Any) -> None:
    """Refuse labels that hold more than boxes and classes.

    Args:
        samples: Data samples of a real batch, or None where there is none.

    Raises:
        DistillError: A detection would have no value for one of the fields.
    """
    for sample in samples or ():
        instances = getattr(sample, 'gt_instances', None)
        more = sorted(set(instances.keys() if instances is not None else ()) - _FIELDS)
        if more:
            raise DistillError(
                f'pseudo_labels adds boxes and classes, but the labels also hold {", ".join(more)}; take that out of '
                'the pipeline (LoadAnnotations), or remove pseudo_labels.'
            )
