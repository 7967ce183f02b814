"""A user's file: a form of predictions, its readers and its loss. Maps of depth, as of mmseg's depth estimators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import interpolate

from kd_plugins.errors import DistillError
from kd_plugins.losses.base import DistillLoss
from kd_plugins.predictions import Classes, Form, register_reader


@dataclass(frozen=True)
class DepthMaps(Form):
    """How far away everything is."""

    name: ClassVar[str] = 'depth'
    head: ClassVar[str] = 'depth'
    by_class: ClassVar[bool] = False

    metres: Tensor  # (B, 1, h, w), > 0

    def __post_init__(self) -> None:
        if self.metres.dim() != 4 or self.metres.shape[1] != 1:
            raise DistillError(f'Depth must be (B, 1, h, w), got {tuple(self.metres.shape)}.')

    @property
    def source(self) -> Tensor:
        return self.metres

    def describe(self) -> str:
        return 'depth {}x{}'.format(*self.metres.shape[2:])

    @classmethod
    def align(cls, student: DepthMaps, teacher: DepthMaps, classes: Classes = None) -> tuple[DepthMaps, DepthMaps]:
        size = student.metres.shape[2:]
        if teacher.metres.shape[2:] == size:
            return student, teacher
        return student, teacher.replace(metres=interpolate(teacher.metres, size, mode='bilinear'))


@register_reader('mmseg.VPDDepthHead', form=DepthMaps)
@register_reader('DepthHead', form=DepthMaps)
def read_depth(head: nn.Module, outputs: Any, *, training: bool) -> DepthMaps:
    """Such a head returns its map."""
    return DepthMaps(outputs)


class ScaleInvariantLoss(DistillLoss):
    """Variance of the difference of log depths (all of it for ``share=0``), mean over the images.

    Eigen et al., "Depth Map Prediction from a Single Image" (NeurIPS 2014, arXiv 1406.2283), equation 4.
    """

    consumes = 'depth'

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = share

    def forward(self, student: DepthMaps, teacher: DepthMaps) -> Tensor:
        gap = (student.metres.log() - teacher.metres.log()).flatten(1)
        return (gap.square().mean(1) - self.share * gap.mean(1).square()).mean()
