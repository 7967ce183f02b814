"""Teacher, plain, natively distilled and distilled student in Ultralytics' trainer: trained, evaluated, tabulated."""

from kd_plugins.lab.comparison.experiment import compare
from kd_plugins.lab.comparison.yolo.demo import demo
from kd_plugins.lab.comparison.yolo.experiment import Comparison

__all__ = ['Comparison', 'compare', 'demo']
