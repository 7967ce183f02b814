"""What kind of model of the MM family one is, and everything that depends on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kd_plugins.mm.targets import image_labels, labels
from kd_plugins.predictions import ClassPredictions, registered


@dataclass(frozen=True)
class Task:
    """A kind of model.

    Attributes:
        name: As recipes name it.
        model: What such a model is called in messages.
        head: Path of what predicts, ``''`` where there is no such module.
        targets: ``targets(inputs, samples)``: the labels of a batch as losses want them, or None.
        sized_by: How a user writes the size of all images.
        metrics: How the names of what it is compared by end.
    """

    name: str
    model: str
    head: str
    targets: Callable[[Any, Any], Tensor | None]
    sized_by: str = "dict(type='Resize', scale=(width, height), keep_ratio=False) in the pipeline"
    metrics: tuple[str, ...] = ('mAP',)

    def fits(self, model: nn.Module) -> bool:
        """Whether a model is one of these."""
        return isinstance(getattr(model, self.head, None), nn.Module)

    def size(self, model: nn.Module) -> tuple[int, int] | None:
        """``(height, width)`` of all images that a model is given; None: batches have any size."""
        return None

    def teach(self, model: nn.Module, modules: Sequence[str]) -> None:
        """A forward pass begins in which these modules are taught; with none of them, it is over."""


@dataclass(frozen=True)
class Classification(Task):
    """Classes of whole images."""

    def fits(self, model: nn.Module) -> bool:
        # Others have a head of that name too; of several tasks, one that classifies is enough.
        head = getattr(model, self.head, None)
        return isinstance(head, nn.Module) and any(registered(m, ClassPredictions) for m in head.modules())

    def size(self, model: nn.Module) -> tuple[int, int] | None:
        return getattr(getattr(model, 'data_preprocessor', None), 'size', None)

    def teach(self, model: nn.Module, modules: Sequence[str]) -> None:
        # While the head of a distillation token is taught, the labels teach the class head alone.
        if hasattr(model, 'separate_heads'):
            model.separate_heads = 'dist_logits' in modules


#: A network in ``net``, whose logits pass a `ClassLogits`.
CLASSIFICATION = Classification(
    'classification', 'classifier', 'logits', image_labels, 'model.input_size', ('top1', 'mAP')
)
#: In this order: a detector may have a semantic branch besides. The second is a backbone with a head (mmpretrain).
TASKS = (
    CLASSIFICATION,
    Classification('classification', 'classifier', 'head', image_labels, metrics=('top1', 'mAP')),
    Task('detection', 'detector', 'bbox_head', labels),
    Task('segmentation', 'segmentor', 'decode_head', labels, 'data_preprocessor.size', metrics=('mIoU',)),
)
#: Models without a head that predicts for every position: two-stage detectors, DETRs, and whatever comes.
OTHER = Task('detection', 'model', '', labels)


def task_of(model: nn.Module) -> Task:
    """The kind of a model."""
    return next((task for task in TASKS if task.fits(model)), OTHER)
