"""The comparison of boxes that suits a pair of detection heads."""

from __future__ import annotations

from torch import Tensor, nn

from kd_plugins.losses._common import check_choice, check_positive, describe
from kd_plugins.losses._dense import Dense
from kd_plugins.losses.base import DistillLoss
from kd_plugins.losses.box_iou import BoxIoULoss
from kd_plugins.losses.box_l1 import BoxL1Loss
from kd_plugins.losses.localization_distill import LocalizationDistillLoss


class AutoBoxLoss(DistillLoss):
    """Localization distillation where both heads have the same bins, else IoU, or L1 where boxes are rotated.

    Consumes two aligned heads. The engine replaces it by the loss that it stands for when it has seen the heads.

    Args:
        temperature: Of localization distillation. None: its default.
        foreground: Weight positions by the teacher's confidence.
    """

    consumes = 'predictions'

    def __init__(self, temperature: float | None = None, foreground: bool = True) -> None:
        super().__init__()
        if temperature is not None:
            check_positive(temperature=temperature)
        check_choice((False, True), foreground=foreground)
        self.temperature = temperature
        self.foreground = foreground

    def for_predictions(self, student: Dense, teacher: Dense) -> nn.Module:
        """The loss that it stands for.

        Args:
            student: Aligned predictions of the student.
            teacher: Aligned predictions of the teacher.
        """
        ours, theirs = student.dist, teacher.dist
        if ours is not None and theirs is not None and ours.shape[-1] == theirs.shape[-1]:
            options = {} if self.temperature is None else {'temperature': self.temperature}
            return LocalizationDistillLoss(foreground=self.foreground, **options)
        kind = BoxIoULoss if student.ltrb is not None and teacher.ltrb is not None else BoxL1Loss
        return kind(foreground=self.foreground)

    def forward(self, student: Dense, teacher: Dense) -> Tensor:
        loss: Tensor = self.for_predictions(student, teacher)(student, teacher)
        return loss

    def extra_repr(self) -> str:
        return describe(temperature=self.temperature, foreground=self.foreground)
