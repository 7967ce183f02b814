"""Teacher, plain student and distilled student of the same seeds: trained, evaluated, tabulated, drawn."""

from kd_plugins.comparison.experiment import compare
from kd_plugins.mm.comparison.demo import PARTS, demo
from kd_plugins.mm.comparison.experiment import Comparison

__all__ = ['PARTS', 'Comparison', 'compare', 'demo']
