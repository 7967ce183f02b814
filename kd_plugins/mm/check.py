"""The check of a session on an MM model before the first iteration."""

from __future__ import annotations

import torch
from torch import nn

from kd_plugins.distiller import CannotRunError, Session, untouched_rng
from kd_plugins.distiller.summary import Row
from kd_plugins.mm.inputs import normalize, pixel_format

#: Pixels of the start-up check: their mean, and the range of the noise that keeps the maps from being constant.
GREY, NOISE = 114.0, 20.0
#: Side of the square image of the start-up check, in pixels: every pyramid up to stride 128 has a cell.
SIDE = 256


def check_session(session: Session, student: nn.Module) -> list[Row]:
    """Run student and teachers once on a grey image with some noise and check every term; nothing changes.

    Models that are trained at one size run at that.

    Args:
        session: The session.
        student: Its student.

    Raises:
        DistillError: A tap does not run, shapes do not fit, or a teacher returns NaN.
    """
    first = next(student.parameters())
    preprocessor = getattr(student, 'data_preprocessor', None)
    channels = len(pixel_format(preprocessor).mean)

    def run(size: tuple[int, int]) -> list[Row]:
        # Not white noise: detectors that were trained on pictures answer it with logits in the hundreds, and boxes
        # decoded from those are infinite. Flat grey is what they are padded with.
        pixels = GREY + NOISE * (torch.rand(1, channels, *size, device=first.device) - 0.5)
        return session.check(normalize(pixels, preprocessor).to(first.dtype))

    with untouched_rng():
        own = session.host.task.size(student)
        if own is not None:
            return run(own)
        try:
            return run((SIDE, SIDE))
        except CannotRunError:
            # Some networks take the size of their training crops only (BEiT's relative positions).
            crop = getattr(preprocessor, 'size', None)
            if not isinstance(crop, (tuple, list)) or len(crop) != 2:
                raise
            return run((int(crop[0]), int(crop[1])))
