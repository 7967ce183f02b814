"""A user's file: a sample weighting."""

import math

from torch import Tensor

from kd_plugins.distiller import register_weighting
from kd_plugins.predictions import Form


@register_weighting('certainty')
class Certainty:
    """Images that a classifier is sure about count more: 1 minus the entropy of the teacher over its largest."""

    needs_target = False

    def __init__(self, least: float = 0.0) -> None:
        self.least = least

    def __call__(self, student: Form, teacher: Form, target: Tensor | None) -> Tensor:
        logs = teacher.source.log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)
        return (1 - entropy / math.log(logs.shape[-1])).clamp(min=self.least)

    def __str__(self) -> str:
        return 'by certainty'
