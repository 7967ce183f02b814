"""Grey and coloured images between students and teachers."""

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.teachers import ULTRALYTICS, PixelFormat, Renormalize

GREY = PixelFormat((33.0,), (77.0,), rgb=True)
COLOUR = PixelFormat((123.0, 116.0, 103.0), (58.0, 57.0, 56.0), rgb=True)


def test_a_grey_student_gives_a_coloured_teacher_copies():
    pixels = torch.randint(0, 256, (2, 1, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (COLOUR.mean, COLOUR.std))
    expected = (pixels.repeat(1, 3, 1, 1) - mean) / std
    torch.testing.assert_close(Renormalize(GREY, COLOUR)((pixels - 33) / 77), expected)
    # Ultralytics' batches are in [0, 1], whatever their number of channels.
    torch.testing.assert_close(Renormalize(ULTRALYTICS, COLOUR, channels=3)(pixels / 255), expected)


def test_copies_of_equal_values():
    """Also where nothing is to be re-normalised, and without writing into the student's batch."""
    images = torch.rand(2, 1, 4, 4)
    for pad in (0.0, 1.0):
        teacher = PixelFormat((33.0,) * 3, (77.0,) * 3, rgb=True, pad=pad)
        assert torch.equal(Renormalize(GREY, teacher)(images), images.repeat(1, 3, 1, 1))


def test_grey_to_grey():
    images = torch.rand(2, 1, 4, 4)
    assert Renormalize(GREY, GREY, channels=1)(images) is images
    torch.testing.assert_close(Renormalize(ULTRALYTICS, GREY, channels=1)(images), (images * 255 - 33) / 77)


def test_coloured_images_for_a_grey_teacher():
    with pytest.raises(DistillError, match='The student sees images of 3 channels and the teacher takes 1;'):
        Renormalize(COLOUR, GREY, channels=1)
    with pytest.raises(DistillError, match='The student sees images of 3 channels and the teacher takes 1;'):
        Renormalize(ULTRALYTICS, GREY, channels=1)(torch.rand(2, 3, 4, 4))
