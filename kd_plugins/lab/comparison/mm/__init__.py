"""Teacher, plain student and distilled student of the same seeds: trained, evaluated, tabulated, drawn."""

from kd_plugins.lab.comparison.experiment import compare
from kd_plugins.lab.comparison.mm.demo import PARTS, demo
from kd_plugins.lab.comparison.mm.experiment import Comparison

__all__ = ['PARTS', 'Comparison', 'compare', 'demo']
