"""Heads of any framework, read into forms that losses are written against: detection, segmentation, classification."""

from kd_plugins.predictions.align import align, match_classes
from kd_plugins.predictions.classes import ClassLogits, ClassPredictions, align_classes, map_class_labels
from kd_plugins.predictions.dense import DensePredictions
from kd_plugins.predictions.form import Classes, Form, form_named, forms
from kd_plugins.predictions.masks import MaskPredictions
from kd_plugins.predictions.pixels import PixelPredictions, align_pixels, common_grid, map_labels
from kd_plugins.predictions.readers import (
    find_reader,
    known_head,
    read,
    readable,
    register_reader,
    register_unreadable,
    registered,
    supported_heads,
)

__all__ = [
    'ClassLogits',
    'ClassPredictions',
    'Classes',
    'DensePredictions',
    'Form',
    'MaskPredictions',
    'PixelPredictions',
    'align',
    'align_classes',
    'align_pixels',
    'common_grid',
    'find_reader',
    'form_named',
    'forms',
    'known_head',
    'map_class_labels',
    'map_labels',
    'match_classes',
    'read',
    'readable',
    'register_reader',
    'register_unreadable',
    'registered',
    'supported_heads',
]
