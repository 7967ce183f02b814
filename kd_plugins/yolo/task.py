"""What kind of model of Ultralytics one is, and everything that depends on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.predictions import ClassPredictions, DensePredictions, Form
from kd_plugins.yolo.heads import is_classifier


@dataclass(frozen=True)
class Task:
    """A kind of model; as it stands here, with a dense head: detect, segment, pose and obb.

    Attributes:
        name: As recipes name it.
        model: What such a model is called in messages.
        form: What it predicts.
        notes: What is special about its losses, for the summary.
    """

    name: str
    model: str
    form: type[Form]
    notes: tuple[str, ...] = ()

    def targets(self, inputs: Any, samples: Any) -> Tensor | None:
        """Labels of a batch as losses want them, None where they want none."""
        return None

    def scale(self, inputs: Tensor) -> int:
        """What a mean over images is multiplied by to be as the task loss: dense losses are sums over the batch."""
        return inputs.shape[0]

    def image_counts(self, dataset: Any, classes: int) -> list[int] | None:
        """Number of training images of each class, None where images have no class.

        Args:
            dataset: Of the trainer.
            classes: How many classes there are.
        """
        return None

    def trained(self, classes: Any) -> Any:
        """The classes that a run with ``classes=[...]`` trains, None for all."""
        return classes


@dataclass(frozen=True)
class Classification(Task):
    """Classes of whole images."""

    def targets(self, inputs: Any, samples: Any) -> Tensor | None:
        if not isinstance(samples, Mapping):
            return inputs.new_zeros(len(inputs), dtype=torch.long)
        return samples['cls'].to(inputs.device)

    def image_counts(self, dataset: Any, classes: int) -> list[int] | None:
        found = Counter(int(sample[1]) for sample in dataset.samples)
        return [found[i] for i in range(classes)]

    def scale(self, inputs: Tensor) -> int:
        return 1

    def trained(self, classes: Any) -> Any:
        # Data sets of whole images have no such filter: the labels of all classes train.
        return None


DETECTION = Task(
    'detection', 'detector', DensePredictions, ('losses are multiplied by the batch size, as the task loss is',)
)
CLASSIFICATION = Classification('classification', 'classifier', ClassPredictions)
TASKS = (CLASSIFICATION, DETECTION)


def task_of(model: nn.Module) -> Task:
    """The kind of a model."""
    return CLASSIFICATION if is_classifier(model) else DETECTION
