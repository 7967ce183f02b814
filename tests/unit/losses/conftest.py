"""Predictions of a made-up head with every field, and the weighted mean of the documentation in plain loops."""

import pytest
import torch

from kd_plugins.predictions.dense import DensePredictions

LEVEL_SIZES, STRIDES = ((2, 3), (1, 2)), (8.0, 16.0)
POSITIONS = 2 * 3 + 1 * 2


def _predictions(batch=2, classes=3, bins=5, seed=0, dtype=torch.float64, spread=2.0, requires_grad=False, **fields):
    """Random predictions; ``fields`` replaces or adds, e.g. ``obj=None``."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        values = torch.randn(batch, POSITIONS, *shape, generator=generator, dtype=torch.float64) * spread
        return values.to(dtype).requires_grad_(requires_grad)

    values = {
        'cls': random(classes),
        'activation': 'sigmoid',
        'level_sizes': LEVEL_SIZES,
        'strides': STRIDES,
        'points': torch.zeros(POSITIONS, 2, dtype=dtype),
        'obj': random(1),
        'ltrb': random(4),
        'dist': random(4, bins),
        'box': random(4),
        'box_coding': 'xywh',
    }
    values.update(fields)
    return DensePredictions(**values)


def _weighted_mean(loss, weight):
    """Per image sum(w * loss) / max(sum(w), 1), then the mean over images; nested lists or arrays (B, A)."""
    images = []
    for image_loss, image_weight in zip(loss, weight, strict=True):
        total = sum(float(w) * float(v) for v, w in zip(image_loss, image_weight, strict=True))
        images.append(total / max(sum(float(w) for w in image_weight), 1.0))
    return sum(images) / len(images)


@pytest.fixture
def predictions():
    return _predictions


@pytest.fixture
def weighted_mean():
    return _weighted_mean
