"""What a distilled training step costs in MMEngine, next to what it cannot do without.

The lower bound of a distilled step is the plain step plus one forward pass of the teacher. Student and distilled
student are both brought up by MMEngine's own Runner and step through ``train_step`` and their ``OptimWrapper``; the
teacher is attached by ``DistillHook`` as in any run.
"""

from kd_plugins.lab.benchmark.mm.command import main, measure, table
from kd_plugins.lab.benchmark.mm.pair import VARIANTS, Setup

__all__ = ['VARIANTS', 'Setup', 'main', 'measure', 'table']
