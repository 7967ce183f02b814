"""What a batch of images looks like to a model, and how to turn one model's batch into another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kd_plugins.errors import DistillError


@dataclass(frozen=True)
class PixelFormat:
    """How a model's input is made from pixels (0 to 255): ``(pixel - mean) / std``, per channel in its own order.

    Attributes:
        mean: Means in pixels, one per channel.
        std: Standard deviations in pixels, one per channel.
        rgb: Whether the channels are RGB; False: BGR.
        pad: What padding holds, in normalised units.
        size: ``(height, width)`` of all images; None: batches have any size.
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    rgb: bool = False
    pad: float = 0.0
    size: tuple[int, int] | None = None

    def __str__(self) -> str:
        mean, std = ([round(v, 2) for v in values] for values in (self.mean, self.std))
        return f'mean {mean} std {std} {"RGB" if self.rgb else "BGR"} pad {self.pad:g}'


#: Ultralytics: RGB in [0, 1], padded with grey.
ULTRALYTICS = PixelFormat(std=(255.0, 255.0, 255.0), rgb=True, pad=114 / 255)


_OTHER_CHANNELS = (
    'The student sees images of {} channels and the teacher takes {}; take a teacher that was trained on the same kind '
    'of images.'
)


class Renormalize:
    """Turns the student's processed batch into the teacher's.

    Both networks see the same augmented pixels. The student's normalisation and the teacher's are affine per channel,
    so going from one to the other is one multiplication and one addition, computed once. What batching padded holds
    the student's pad value, which is not a pixel: it is reset to the teacher's where the samples say how large an
    image is.

    Args:
        student: The format of the batches.
        teacher: The format that the teacher expects.
        channels: How many channels the teacher takes: grey images are repeated to as many. Default: as they come, and
            three where the student's format has one channel and the teacher's three.

    Raises:
        DistillError: The formats have other numbers of channels.

    Attributes:
        same: Whether both agree, so that the student's tensor itself is handed on.
        description: For the summary table.
    """

    def __init__(self, student: PixelFormat, teacher: PixelFormat, channels: int | None = None) -> None:
        ours, theirs = ([torch.tensor(v, dtype=torch.float64) for v in (f.mean, f.std)] for f in (student, teacher))
        counts = len(student.mean), len(teacher.mean)
        if counts[0] == 1:
            ours = [v.expand(counts[1]) for v in ours]
            channels = counts[1] if channels is None else channels
        elif counts[1] == 1 and all(bool((v == v[0]).all()) for v in ours):
            # Such a format (Ultralytics') says nothing of the number of channels; the images will.
            ours = [v[:1] for v in ours]
        elif counts[0] != counts[1]:
            raise DistillError(_OTHER_CHANNELS.format(*counts))
        self.channels = channels
        self.flip = student.rgb != teacher.rgb
        # The student's statistics, in the teacher's channel order.
        mean, std = (v.flip(0) if self.flip else v for v in ours)
        self.scale = (std / theirs[1]).float().view(1, -1, 1, 1)
        self.shift = ((mean - theirs[0]) / theirs[1]).float().view(1, -1, 1, 1)
        self.pad_value = teacher.pad
        self._moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.same_values = not self.flip and bool(torch.equal(mean, theirs[0])) and bool(torch.equal(std, theirs[1]))
        self.same = self.same_values and student.pad == teacher.pad
        self.description = 'same as student' if self.same else f'{teacher} (student: {student})'

    def __call__(self, inputs: Any, samples: Sequence[Any] | None = None) -> Tensor:
        """Make the teacher's batch.

        Args:
            inputs: ``(B, 3, H, W)`` the student's processed batch.
            samples: Its data samples; ``img_shape`` says where an image ends and padding begins.

        Returns:
            ``(B, 3, H, W)``, the same tensor when nothing has to change.

        Raises:
            DistillError: The batch is not one image tensor.
        """
        if not isinstance(inputs, Tensor) or inputs.dim() != 4:
            kind = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise DistillError(f'Distillation needs batches of images (B, C, H, W), this model is given {kind}.')
        if self.channels is not None and inputs.shape[1] != self.channels:
            if inputs.shape[1] != 1:
                raise DistillError(_OTHER_CHANNELS.format(inputs.shape[1], self.channels))
            inputs = inputs.expand(-1, self.channels, -1, -1)
        if self.same:
            return inputs
        if self.same_values:
            result = inputs.clone()
        else:
            source = inputs.flip(1) if self.flip else inputs
            scale, shift = self._on(source)
            result = torch.addcmul(shift, source, scale)
        height, width = result.shape[-2:]
        for image, sample in zip(result, samples or (), strict=False):
            shape = getattr(sample, 'metainfo', {}).get('img_shape')
            if shape is not None:
                h, w = int(shape[0]), int(shape[1])
                if h < height:
                    image[:, h:] = self.pad_value
                if w < width:
                    image[:, :, w:] = self.pad_value
        return result

    def _on(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift like the images; moved once, because a copy from the CPU makes the host wait for the GPU."""
        key = (images.device, images.dtype)
        if key not in self._moved:
            self._moved[key] = self.scale.to(images), self.shift.to(images)
        return self._moved[key]


class Resized:
    """Re-normalises the student's batch and resizes it to the teacher's resolution.

    Args:
        renormalize: Makes the teacher's batch at the student's resolution.
        size: ``(height, width)`` in pixels, or the factor by which both sides grow.
        mode: Interpolation: ``'bilinear'`` or ``'bicubic'``.
    """

    def __init__(self, renormalize: Renormalize, size: tuple[int, int] | float, mode: str = 'bilinear') -> None:
        self.renormalize, self.size, self.mode = renormalize, size, mode
        shown = f'resized to {size[0]}x{size[1]}' if isinstance(size, tuple) else f'resized by {size:g}'
        self.description = f'{renormalize.description}, {shown}'

    def __call__(self, inputs: Any, samples: Sequence[Any] | None = None) -> Tensor:
        """Make the teacher's batch, see `Renormalize`; the same tensor when nothing has to change."""
        images = self.renormalize(inputs, samples)
        size = self.size
        if not isinstance(size, tuple):
            size = tuple(max(1, round(side * size)) for side in images.shape[-2:])
        if tuple(images.shape[-2:]) == size:
            return images
        # In float32: antialiasing has no half precision on the CPU.
        resized = interpolate(images.float(), size, mode=self.mode, align_corners=False, antialias=True)
        return resized.to(images.dtype)
