"""Teacher, plain student and distilled student of the same seeds: trained, evaluated, tabulated, drawn."""

from kd_plugins.comparison.experiment import compare
from kd_plugins.mm.comparison.demo import demo, demo_across_architectures, demo_classification, demo_segmentation
from kd_plugins.mm.comparison.experiment import Comparison

__all__ = ['Comparison', 'compare', 'demo', 'demo_across_architectures', 'demo_classification', 'demo_segmentation']
