"""Teacher, plain, natively distilled and distilled student in Ultralytics' trainer: trained, evaluated, tabulated."""

from kd_plugins.yolo.comparison.demo import demo
from kd_plugins.yolo.comparison.experiment import Comparison, compare

__all__ = ['Comparison', 'compare', 'demo']
