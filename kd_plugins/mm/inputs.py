"""How the data preprocessors of the MM family make a network's input from pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from kd_plugins.mm.task import task_of
from kd_plugins.teachers import PixelFormat, Renormalize


class TeacherInputs(Renormalize):
    """Re-normalises a processed batch from the student's statistics to the teacher's.

    Args:
        student: The student's ``data_preprocessor`` (MMEngine's ``ImgDataPreprocessor`` or a subclass), or the format
            of a student of another zoo.
        teacher: The teacher's ``data_preprocessor``.
    """

    def __init__(self, student: nn.Module | PixelFormat | None, teacher: nn.Module | None) -> None:
        super().__init__(student if isinstance(student, PixelFormat) else pixel_format(student), pixel_format(teacher))


def normalize(pixels: Tensor, preprocessor: nn.Module | None) -> Tensor:
    """Pixels (0 to 255, in the network's channel order) as a data preprocessor would hand them to the network."""
    known = pixel_format(preprocessor)
    mean, std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (known.mean, known.std))
    return (pixels - mean) / std


def pixel_format(preprocessor: nn.Module | None) -> PixelFormat:
    """Mean, std, channel order and pad value of a data preprocessor; plain BGR pixels when there is none."""
    known = getattr(preprocessor, 'pixel_format', None)
    if isinstance(known, PixelFormat):
        return known
    mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
    enabled = getattr(preprocessor, '_enable_normalize', mean is not None) and mean is not None
    # MMSegmentation stores the flag without the underscore. MMEngine's pipelines decode to BGR.
    flip = getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'channel_conversion', False))
    return PixelFormat(
        mean=_three(mean) if enabled else (0.0, 0.0, 0.0),
        std=_three(std) if enabled else (1.0, 1.0, 1.0),
        rgb=bool(flip),
        pad=float(getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0)) or 0),
    )


def _three(value: Any) -> tuple[float, ...]:
    flat = value.detach().double().cpu().reshape(-1)
    return tuple((flat.expand(3) if flat.numel() == 1 else flat).tolist())


def student_format(model: nn.Module) -> PixelFormat:
    """What a student's processed batches look like."""
    return replace(pixel_format(getattr(model, 'data_preprocessor', None)), size=task_of(model).size(model))
