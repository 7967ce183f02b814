"""Heads of any framework, read into forms that losses are written against: detection and segmentation."""

from kd_plugins.predictions.align import align, match_classes
from kd_plugins.predictions.dense import DensePredictions
from kd_plugins.predictions.pixels import PixelPredictions, align_pixels, common_grid, map_labels
from kd_plugins.predictions.readers import (
    find_reader,
    read,
    readable,
    register_reader,
    register_unreadable,
    supported_heads,
)

__all__ = [
    'DensePredictions',
    'PixelPredictions',
    'align',
    'align_pixels',
    'common_grid',
    'find_reader',
    'map_labels',
    'match_classes',
    'read',
    'readable',
    'register_reader',
    'register_unreadable',
    'supported_heads',
]
