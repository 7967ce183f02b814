"""What a distilled training step costs in MMEngine, next to what it cannot do without.

Student and distilled student are both brought up by MMEngine's own Runner and step through ``train_step`` and their
``OptimWrapper``; the teacher is attached by ``DistillHook`` as in any run.
"""

from kd_plugins.lab.benchmark.mm.pair import MMPair

__all__ = ['MMPair']
