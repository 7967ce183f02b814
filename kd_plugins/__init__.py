"""Knowledge distillation plugins for MMEngine (mmdet, mmseg) and Ultralytics.

This module imports no framework, not even torch: import the sub-package of the one you use.
"""

__version__ = '0.1.0'
