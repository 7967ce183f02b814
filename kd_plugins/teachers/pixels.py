"""What a batch of images looks like to a model, and how to turn one model's batch into another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from kd_plugins.errors import DistillError, check_keys


@dataclass(frozen=True)
class PixelFormat:
    """How a model's input is made from pixels (0 to 255): ``(pixel - mean) / std``, per channel in its own order.

    Attributes:
        mean: Means in pixels, one per channel; a single one is that of every channel.
        std: Standard deviations in pixels, likewise.
        rgb: Whether the first three channels are RGB; False: BGR.
        pad: What padding holds, in normalised units.
        size: ``(height, width)`` of all images; None: batches have any size.
        divisor: Whole number that both sides of every batch are multiples of.
        seen: The lowest and the highest pixel of a real batch, where there was one.
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    rgb: bool = False
    pad: float = 0.0
    size: tuple[int, int] | None = None
    divisor: int = 1
    seen: tuple[float, float] | None = field(default=None, compare=False)

    @classmethod
    def from_options(cls, options: Any, where: str) -> PixelFormat:
        """Read what somebody wrote into a config.

        Args:
            options: ``dict(mean=(R, G, B), std=(R, G, B), rgb=True, pad=0.0)``; ``mean`` and ``std`` in pixels and in
                the order of the channels, a number for all channels alike. ``pad`` may be left out, and ``rgb`` where
                there are no three channels.
            where: The option, for messages.

        Raises:
            DistillError: A key is missing or misspelt, or a value cannot be right.
        """
        if isinstance(options, cls):
            return options
        if not isinstance(options, Mapping):
            raise DistillError(f'{where} must be {_EXAMPLE}, got {options!r}.')
        check_keys(options, ('mean', 'std', 'rgb', 'pad'), where)
        mean, std = (_numbers(options.get(key), f'{where}.{key}') for key in ('mean', 'std'))
        if 1 not in (len(mean), len(std)) and len(mean) != len(std):
            raise DistillError(f'{where}: mean has {len(mean)} numbers and std {len(std)}; write one for each channel.')
        if 0 in std:
            raise DistillError(f'{where}.std must not be 0, got {std}.')
        count = max(len(mean), len(std))
        rgb = options.get('rgb', None if count in (1, 3) else False)
        if not isinstance(rgb, bool):
            raise DistillError(f'{where}.rgb must be True (RGB) or False (BGR, as MMEngine decodes), got {rgb!r}.')
        (pad,) = _numbers(options.get('pad', 0.0), f'{where}.pad')
        mean, std = (v * count if len(v) == 1 else v for v in (mean, std))
        return cls(mean=mean, std=std, rgb=rgb, pad=pad)

    def __str__(self) -> str:
        # Plus 0: a measured mean may be -0.0.
        mean, std = ([round(v, 2) + 0.0 for v in values] for values in (self.mean, self.std))
        return f'mean {mean} std {std} {"RGB" if self.rgb else "BGR"} pad {self.pad:g}'


#: Ultralytics: RGB in [0, 1], padded with grey.
ULTRALYTICS = PixelFormat(std=(255.0, 255.0, 255.0), rgb=True, pad=114 / 255)

#: Grey levels: no batch of coloured pictures is that dark throughout.
_DARK = 8.0

_EXAMPLE = 'dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), rgb=True, pad=0.0)'

_OTHER_CHANNELS = (
    'The student sees images of {} channels and the teacher takes {}; take a teacher that was trained on the same kind '
    'of images.'
)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if not values or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise DistillError(f'{where} must be a number or one for each channel, got {value!r}.')
    return tuple(map(float, values))


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
            the number in the teacher's format where the student's has one and the teacher's several.

    Raises:
        DistillError: The formats have other numbers of channels, or the student's batches are no pixels in its format.

    Attributes:
        same: Whether both agree, so that the student's tensor itself is handed on.
        description: For the summary table.
    """

    def __init__(self, student: PixelFormat, teacher: PixelFormat, channels: int | None = None) -> None:
        ours, theirs = ([torch.tensor(v, dtype=torch.float64) for v in (f.mean, f.std)] for f in (student, teacher))
        if channels is None and len(ours[0]) == 1 < len(theirs[0]):
            channels = len(theirs[0])
        # Where all channels are alike (Ultralytics), a format says nothing of their number; the images will.
        ours = _alike(ours)
        theirs = theirs if channels is None else _alike(theirs)
        #: Of the student's images, where its format says so; 1: any number.
        self._channels = len(ours[0])
        takes = channels or (len(theirs[0]) if len(theirs[0]) > 1 else None)
        if self._channels > 1 and takes not in (None, self._channels):
            raise DistillError(_OTHER_CHANNELS.format(self._channels, takes))
        if len(theirs[0]) not in (1, takes):
            raise DistillError(
                f'The teacher takes images of {takes} channels, but its mean and std are of {len(theirs[0])}; write '
                'one number for each channel.'
            )
        self.channels = channels
        self.flip = student.rgb != teacher.rgb
        # The student's statistics, in the teacher's channel order.
        mean, std = (_flip(v[None])[0] if self.flip and len(v) > 2 else v for v in ours)
        self.scale = (std / theirs[1]).float().view(1, -1, 1, 1)
        self.shift = ((mean - theirs[0]) / theirs[1]).float().view(1, -1, 1, 1)
        self.pad_value = teacher.pad
        self._same_pad = student.pad == teacher.pad
        self._moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._same_statistics = all(bool((a == b).all()) for a, b in ((mean, theirs[0]), (std, theirs[1])))
        if student.seen is not None and len(student.mean) == 3 and not self._same_statistics:
            low, high = student.seen
            if low < high and max(-low, high) < _DARK:
                raise DistillError(
                    f"The student's images, brought back to pixels ({student}), lie between {low:.2f} and {high:.2f} "
                    'instead of 0 and 255: something scales them that cannot be seen; write pixel_format='
                    'dict(mean=(...), std=(...), rgb=True) beside teacher and terms.'
                )
        self.same = self._same_statistics and self._same_pad and not self.flip
        self.description = 'same as student' if self.same else f'{teacher} (student: {student})'

    def __call__(self, inputs: Any, samples: Sequence[Any] | None = None) -> Tensor:
        """Make the teacher's batch.

        Args:
            inputs: ``(B, C, H, W)`` the student's processed batch.
            samples: Its data samples; ``img_shape`` says where an image ends and padding begins.

        Returns:
            ``(B, C', H, W)``, the same tensor when nothing has to change.

        Raises:
            DistillError: The batch is not one image tensor, or of other channels.
        """
        if not isinstance(inputs, Tensor) or inputs.dim() != 4:
            kind = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise DistillError(f'Distillation needs batches of images (B, C, H, W), this model is given {kind}.')
        count = inputs.shape[1]
        takes = count if self.channels is None else self.channels
        if count not in (1, takes):
            raise DistillError(_OTHER_CHANNELS.format(count, takes))
        if self._channels not in (1, count):
            raise DistillError(
                f'The student sees images of {count} channels, but its mean and std are of {self._channels}.'
            )
        # Grey is grey in any order.
        flip = self.flip and count > 2
        if self._same_statistics and not flip:
            inputs = inputs.expand(-1, takes, -1, -1) if count != takes else inputs
            if self._same_pad:
                return inputs
            result = inputs.clone()
        else:
            source = _flip(inputs) if flip else inputs
            scale, shift = self._on(source)
            result = torch.addcmul(shift, source.expand(-1, takes, -1, -1), scale)
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


def _alike(values: list[Tensor]) -> list[Tensor]:
    """One number where those of all channels are the same."""
    return [v[:1] for v in values] if all(bool((v == v[0]).all()) for v in values) else values


def _flip(images: Tensor) -> Tensor:
    """The other channel order of ``(B, C, ...)``: the first three change places, others (alpha, infrared) stay.

    By slices, because indices from the host make it wait for the GPU.
    """
    return torch.cat([images[:, :3].flip(1), images[:, 3:]], 1) if images.shape[1] > 3 else images.flip(1)


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
        height, width = images.shape[-2:]
        if isinstance(self.size, tuple):
            size = self.size
        else:
            size = (max(1, round(height * self.size)), max(1, round(width * self.size)))
        if (height, width) == size:
            return images
        # In float32: antialiasing has no half precision on the CPU.
        resized = interpolate(images.float(), size, mode=self.mode, align_corners=False, antialias=True)
        return resized.to(images.dtype)


class Padding:
    """Padding of the teacher's batch to the sides that its network needs, and what is cut off its outputs for it.

    A network whose pyramid is deeper than the student's, or one that merges its levels cell by cell, takes sides that
    are multiples of something only. What padding adds to its maps is no part of the picture, and the student's maps
    have no such cells: they are taken off again, so that cell lies on cell.

    Args:
        divisor: What both sides must be multiples of.
        value: What padding holds, in the teacher's normalised units.
    """

    def __init__(self, divisor: int, value: float) -> None:
        self.divisor, self.value = divisor, value

    def __call__(self, images: Tensor) -> Tensor:
        """Pad ``(B, C, H, W)`` at the right and at the bottom; the same tensor where nothing is missing."""
        below, right = (-side % self.divisor for side in images.shape[-2:])
        return pad(images, (0, right, 0, below), value=self.value) if below or right else images

    def cut(self, output: Tensor, padded: Sequence[int], inside: Sequence[int]) -> Tensor:
        """What the network made of the picture alone.

        Args:
            output: Any output of the network. Maps ``(B, C, H, W)`` and ``(B, H, W, C)`` with a cell for every
                ``stride x stride`` pixels are cut; coarser ones than ``divisor`` need not be, and what is no map
                (queries, vectors) stays.
            padded: ``(height, width)`` of the padded images.
            inside: That of the images.
        """
        for first in (2, 1):
            if output.dim() != 4:
                break
            grid = tuple(output.shape[first : first + 2])
            stride = padded[0] // grid[0]
            if stride < self.divisor and tuple(padded) == (grid[0] * stride, grid[1] * stride):
                for dim, side in enumerate(inside, first):
                    output = output.narrow(dim, 0, -(-side // stride))
                break
        return output
