"""Teacher, plain, natively distilled and distilled student in Ultralytics' trainer: trained, evaluated, tabulated."""

from kd_plugins.comparison.experiment import compare
from kd_plugins.yolo.comparison.demo import demo
from kd_plugins.yolo.comparison.experiment import Comparison

__all__ = ['Comparison', 'compare', 'demo']
