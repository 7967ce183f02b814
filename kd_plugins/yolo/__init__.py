"""Distillation inside Ultralytics' own trainer. Importing this imports no Ultralytics; it is loaded when training.

Ultralytics is licensed under AGPL-3.0. It is an optional dependency, used through its public interfaces only.
"""

from kd_plugins.on_import import complete_callbacks
from kd_plugins.yolo import heads as heads  # registers the readers
from kd_plugins.yolo.callback import DistillCallback
from kd_plugins.yolo.options import DistillOptions
from kd_plugins.yolo.resume import watch

__all__ = ['DistillCallback', 'DistillOptions']

# Wherever this is imported, a distilled run is not resumed undistilled without a word.
complete_callbacks(watch)
