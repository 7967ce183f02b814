"""Ultralytics' ``Classify`` head, read into :class:`~kd_plugins.predictions.ClassPredictions`.

Registered by name, so importing this module imports no framework.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kd_plugins.predictions import ClassPredictions, register_reader


@register_reader('ultralytics.Classify', form=ClassPredictions)
def read_classify(head: nn.Module, outputs: Any, *, training: bool) -> ClassPredictions:
    """The logits: all that the head returns in training, the second of (probabilities, logits) in evaluation."""
    return ClassPredictions(outputs[-1] if isinstance(outputs, (tuple, list)) else outputs)
