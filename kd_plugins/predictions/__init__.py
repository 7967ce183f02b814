"""Detection heads of any framework, read into one form that losses are written against."""

from kd_plugins.predictions.align import align, match_classes
from kd_plugins.predictions.dense import DensePredictions
from kd_plugins.predictions.readers import find_reader, read, register_reader, supported_heads

__all__ = [
    'DensePredictions',
    'align',
    'find_reader',
    'match_classes',
    'read',
    'register_reader',
    'supported_heads',
]
