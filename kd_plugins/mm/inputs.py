"""The teacher's input, made from the student's processed batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.errors import DistillError


class TeacherInputs:
    """Re-normalises a processed batch from the student's statistics to the teacher's.

    Both networks see the same augmented pixels. The student's normalisation and the teacher's are affine per channel,
    so going from one to the other is one multiplication and one addition, computed once. What batching padded holds
    the student's pad value, which is not a pixel: it is reset to the teacher's.

    Args:
        student: The student's ``data_preprocessor`` (MMEngine's ``ImgDataPreprocessor`` or a subclass).
        teacher: The teacher's.

    Attributes:
        same: Whether both agree, so that the student's tensor itself is handed on.
        description: For the summary table.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        ours, theirs = _Normalization(student), _Normalization(teacher)
        self.flip = ours.flip != theirs.flip
        # The student's statistics, in the teacher's channel order.
        mean, std = (v.flip(0) if self.flip else v for v in (ours.mean, ours.std))
        self.scale = (std / theirs.std).float().view(1, -1, 1, 1)
        self.shift = ((mean - theirs.mean) / theirs.std).float().view(1, -1, 1, 1)
        self.pad_value = theirs.pad_value
        self._moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.same_values = not self.flip and bool(torch.equal(mean, theirs.mean) and torch.equal(std, theirs.std))
        self.same = self.same_values and ours.pad_value == theirs.pad_value
        self.description = 'same as student' if self.same else f'{theirs} (student: {ours})'

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


def normalize(pixels: Tensor, preprocessor: nn.Module | None) -> Tensor:
    """Pixels (0 to 255, in the network's channel order) as a data preprocessor would hand them to the network."""
    statistics = _Normalization(preprocessor)
    mean, std = (v.to(pixels).view(1, -1, 1, 1) for v in (statistics.mean, statistics.std))
    return (pixels - mean) / std


class _Normalization:
    """Mean, std, channel flip and pad value of a data preprocessor, as float64 tensors."""

    def __init__(self, preprocessor: nn.Module | None) -> None:
        mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
        enabled = getattr(preprocessor, '_enable_normalize', mean is not None) and mean is not None
        self.mean = self._three(mean) if enabled else torch.zeros(3, dtype=torch.float64)
        self.std = self._three(std) if enabled else torch.ones(3, dtype=torch.float64)
        # MMSegmentation stores the flag without the underscore.
        self.flip = bool(
            getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'channel_conversion', False))
        )
        self.pad_value = float(getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0)) or 0)

    @staticmethod
    def _three(value: Tensor) -> Tensor:
        flat = value.detach().double().cpu().reshape(-1)
        return flat.expand(3).clone() if flat.numel() == 1 else flat

    def __str__(self) -> str:
        def short(values: Tensor) -> list[float]:
            return [round(v, 2) for v in values.tolist()]

        # MMEngine's pipelines decode to BGR.
        return f'mean {short(self.mean)} std {short(self.std)} {"RGB" if self.flip else "BGR"} pad {self.pad_value:g}'
