"""A user's file: a loss on features."""

from torch import Tensor

from kd_plugins.losses.base import DistillLoss


class LogCoshLoss(DistillLoss):
    """Mean of ``log cosh(scale * (f_s - f_t))``: like a square near 0, like a distance far away."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (self.scale * (student - teacher)).cosh().log().mean()
