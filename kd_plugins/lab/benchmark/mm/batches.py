"""Random batches, as the loaders of detectors and classifiers make them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.structures import InstanceData

from kd_plugins.classification.sample import ClassSample
from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import DistillError
from kd_plugins.lab.benchmark.measure import random_boxes
from kd_plugins.mm.configs import without_pretrained
from kd_plugins.mm.teacher import dataset_classes, num_classes, own_size

#: Defaults on the CPU and on CUDA; a classifier is given images of its own size.
DETECTION = dict(image_size=((320, 320), (640, 640)), batch_size=(2, 8))
CLASSIFICATION = dict(batch_size=(8, 128))


@dataclass(frozen=True)
class Detections:
    """Images with boxes as COCO has them: 7 per image, small ones prevail.

    Attributes:
        number: Number of classes.
        sizes: Defaults on the CPU and on CUDA of ``image_size`` and ``batch_size``.
        fixed: The only ``(height, width)`` that the model takes, or None.
    """

    number: int
    sizes: ClassVar[Mapping[str, tuple[Any, Any]]] = DETECTION
    fixed: ClassVar[None] = None

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> dict[str, Any]:
        """An item of ``(height, width)`` pixels."""
        from mmdet.structures import DetDataSample

        meta = dict(img_id=0, img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), flip=False)
        sample = DetDataSample(metainfo=meta)
        boxes, labels = random_boxes(7, torch.tensor(size[::-1]), generator), _integers(self.number, (7,), generator)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        return dict(inputs=_image(3, size, generator), data_samples=sample)


@dataclass(frozen=True)
class Labels:
    """Images with one class, or with any number of them; attributes as of `Detections`."""

    number: int
    channels: int
    multi_label: bool
    fixed: tuple[int, int]

    @property
    def sizes(self) -> dict[str, tuple[Any, Any]]:
        """Defaults on the CPU and on CUDA of ``image_size`` and ``batch_size``."""
        return dict(CLASSIFICATION, image_size=(self.fixed, self.fixed))

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> dict[str, Any]:
        """An item of ``(height, width)`` pixels."""
        sample = ClassSample(metainfo=dict(img_shape=size))
        some = _integers(2, (self.number,), generator).float() if self.multi_label else None
        sample.gt_label = _integers(self.number, (), generator) if some is None else some
        return dict(inputs=_image(self.channels, size, generator), data_samples=sample)


class Batch(torch.utils.data.Dataset):
    """As many random items as a batch has; each is copied when it is taken, because models write into samples."""

    def __init__(self, kind: Detections | Labels, config: Config, image_size: tuple[int, int], batch_size: int) -> None:
        names = dataset_classes(config)
        self.metainfo = {} if names is None or len(names) != kind.number else {'classes': tuple(names)}
        generator = torch.Generator().manual_seed(0)
        self._items = [kind.draw(image_size, generator) for _ in range(batch_size)]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return copy.deepcopy(self._items[index])


def find_kind(config: Config) -> Detections | Labels:
    """What the model of a plain config is trained on. Builds a classifier: only the network knows its classes.

    Raises:
        DistillError: It is neither a one-stage detector nor a classifier.
    """
    head = config.model.get('bbox_head')
    number = head.get('num_classes') if isinstance(head, Mapping) else None
    if isinstance(number, int):
        return Detections(number)
    if str(config.model.get('type')).split('.')[-1] == 'TimmClassifier':
        with untouched_rng():
            model = MODELS.build(without_pretrained(config.model))
        channels = len(model.data_preprocessor.mean)
        return Labels(num_classes(model), channels, model.multi_label, own_size(model))
    raise DistillError(
        'The benchmark makes batches for one-stage detectors (model.bbox_head.num_classes) and for '
        f'kd_plugins.TimmClassifier; {config.model.get("type")} is neither.'
    )


def _image(channels: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(256, (channels, *size), dtype=torch.uint8, generator=generator)


def _integers(below: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(below, shape, generator=generator)
