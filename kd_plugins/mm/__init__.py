"""Distillation inside MMEngine's Runner: importing this registers everything under the scope ``kd_plugins``."""

# First: it says in a sentence when there is no MMEngine.
from kd_plugins import registry  # noqa: F401  # isort: skip
from kd_plugins.classification import datasets, long_tail, metrics  # noqa: F401  (register them)
from kd_plugins.classification.classifier import TimmClassifier
from kd_plugins.classification.preprocessor import ClassifierPreprocessor
from kd_plugins.mm import classification_heads, heads, segmentation_heads  # noqa: F401  (register the head readers)
from kd_plugins.mm.distilled import distilled
from kd_plugins.mm.hook import DistillHook

__all__ = ['ClassifierPreprocessor', 'DistillHook', 'TimmClassifier', 'distilled']
