"""Masked generative distillation: recover the teacher's features from a part of the student's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import aligned, check_not_negative, describe, full_precision
from kd_plugins.losses.base import DistillLoss


def mgd(student: Tensor, teacher: Tensor, generator: Callable[[Tensor], Tensor], *, mask_ratio: float = 0.65) -> Tensor:
    r"""Mean squared error between the teacher's features and those generated from the masked student's.

    .. math:: \frac{1}{B C H W} \sum \left( f^t - G(M \odot f^s) \right)^2

    Yang et al., "Masked Generative Distillation" (ECCV 2022, arXiv 2205.01529), section 3. ``M`` hides each position
    of each image with probability ``mask_ratio``, in all channels alike, and is drawn anew at every call, from torch's
    default generator on the student's device. The student's map has passed the projection to the teacher's channels
    already (here the term's adapter). The loss is random, and 0 at equality only for an identity as generator that
    nothing is hidden from.

    Deviation: the mean over all elements instead of the sum, so that a weight means the same for every map size. The
    authors' code divides the sum by B and weighs it by ``alpha_mgd``, 2e-5 for one-stage detectors; the weight that
    does the same here is ``alpha_mgd * C * H * W``, e.g. 33 for 256 channels on 80x80 positions.

    Args:
        student: ``(B, C, H, W)`` features.
        teacher: Same shape as ``student``; no gradient flows into it.
        generator: ``G``: maps ``(B, C, H, W)`` to the same shape and is trained with the student, e.g. `MGDGenerator`.
        mask_ratio: Probability of hiding a position, 0 <= ``mask_ratio`` < 1. The paper takes 0.65 for one-stage
            detectors.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are). The generator too runs in full precision.

    Raises:
        DistillError: Shapes differ, the generator changes the shape, or ``mask_ratio`` is out of range.
    """
    _check(mask_ratio)
    student, teacher = aligned(student, teacher, 'Features', "an adapter brings them together: adapter='auto'")
    if student.dim() != 4:
        raise DistillError(f'Features must be (B, C, H, W), got {tuple(student.shape)}.')
    with full_precision(student):
        batch, _, height, width = student.shape
        hidden = torch.rand(batch, 1, height, width, device=student.device) < mask_ratio
        generated = generator(student.masked_fill(hidden, 0))
        if generated.shape != teacher.shape:
            raise DistillError(
                f'The generator must keep the shape {tuple(teacher.shape)}, it made {tuple(generated.shape)}.'
            )
        return (generated - teacher).square().sum() / max(teacher.numel(), 1)


def _check(mask_ratio: float) -> None:
    check_not_negative(mask_ratio=mask_ratio)
    if mask_ratio >= 1:
        raise DistillError(f'mask_ratio must be below 1, which would hide the whole map, got {mask_ratio!r}.')


class MGDGenerator(nn.Module):
    """The paper's generator: 3x3 convolution, ReLU, 3x3 convolution, all with the teacher's channels.

    Args:
        channels: Channels of the teacher's features.

    Raises:
        DistillError: ``channels`` is not a positive integer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
            raise DistillError(f'channels must be an integer >= 1, got {channels!r}.')
        self.channels = channels
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Generate.

        Args:
            features: ``(B, channels, H, W)``.

        Returns:
            ``(B, channels, H, W)``.
        """
        if features.shape[1] != self.channels:
            raise DistillError(f'The generator was built for {self.channels} channels, got {tuple(features.shape)}.')
        return self.conv2(relu(self.conv1(features)))


class MGDLoss(DistillLoss):
    """Module form of `mgd`, which see; owns the generator, which has to be trained with the student.

    A generator belongs to one feature level. For several levels, or channels known later only, make one loss without
    ``channels`` and take `for_channels` for each level.

    Args:
        mask_ratio: Probability of hiding a position.
        channels: Channels of the teacher's features. None: no generator yet.
    """

    consumes = 'features'

    def __init__(self, mask_ratio: float = 0.65, channels: int | None = None) -> None:
        super().__init__()
        _check(mask_ratio)
        self.mask_ratio = mask_ratio
        self.generator = None if channels is None else MGDGenerator(channels)

    def for_channels(self, channels: int) -> MGDLoss:
        """A new loss with the same hyper-parameters and a freshly initialised generator."""
        return MGDLoss(self.mask_ratio, channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.generator is None:
            raise DistillError(
                "MGDLoss has no generator yet: give it the channels of the teacher's features, MGDLoss(channels=...)."
            )
        return mgd(student, teacher, self.generator, mask_ratio=self.mask_ratio)

    def extra_repr(self) -> str:
        return describe(mask_ratio=self.mask_ratio, channels=getattr(self.generator, 'channels', None))
