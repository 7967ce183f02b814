"""Grey and coloured images between students and teachers."""

from types import SimpleNamespace

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.teachers import ULTRALYTICS, FrozenTeacher, Padding, PixelFormat, Renormalize

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


FOUR = PixelFormat((10.0, 20.0, 30.0, 40.0), (2.0, 3.0, 4.0, 5.0), rgb=True)


def test_four_channels_keep_the_fourth_in_its_place():
    """RGB and infrared for a network that was trained on BGR and infrared."""
    pixels = torch.rand(2, 4, 3, 3) * 255
    batch = (pixels - torch.tensor(FOUR.mean).view(4, 1, 1)) / torch.tensor(FOUR.std).view(4, 1, 1)
    swapped = pixels[:, [2, 1, 0, 3]]
    torch.testing.assert_close(Renormalize(FOUR, PixelFormat((0.0,) * 4, (1.0,) * 4))(batch), swapped)
    # One number for all says nothing of how many there are.
    torch.testing.assert_close(Renormalize(FOUR, PixelFormat((0.0,), (1.0,)), channels=4)(batch), swapped)
    one = PixelFormat((7.0,), (3.0,), rgb=True)
    torch.testing.assert_close(Renormalize(FOUR, one, channels=4)(batch), (pixels - 7) / 3)


def test_order_means_nothing_without_colours():
    for channels in (1, 2):
        images = torch.rand(2, channels, 3, 3)
        student, teacher = (PixelFormat((0.0,) * channels, (1.0,) * channels, rgb=rgb) for rgb in (True, False))
        assert Renormalize(student, teacher)(images) is images


def test_numbers_of_channels_that_do_not_fit():
    for student, teacher, channels in ((FOUR, COLOUR, 3), (COLOUR, FOUR, None), (COLOUR, GREY, 1)):
        with pytest.raises(DistillError, match=r'The student sees images of \d channels and the teacher takes \d;'):
            Renormalize(student, teacher, channels)
    with pytest.raises(DistillError, match='takes images of 4 channels, but its mean and std are of 3'):
        Renormalize(GREY, COLOUR, channels=4)
    with pytest.raises(DistillError, match='sees images of 1 channels, but its mean and std are of 3'):
        Renormalize(COLOUR, PixelFormat())(torch.rand(1, 1, 4, 4))
    # Alike in all channels: the images say how many.
    for count in (1, 3, 4):
        assert Renormalize(ULTRALYTICS, COLOUR if count < 4 else FOUR, None)(torch.rand(1, count, 2, 2)).shape[1] in (
            3,
            4,
        )


@pytest.mark.parametrize('same', [True, False])
def test_formats_that_differ_in_their_padding_alone(same):
    """A border of grey is nothing that a teacher which was padded with its mean has ever seen."""
    student = PixelFormat(COLOUR.mean, COLOUR.std, rgb=True, pad=0.5)
    teacher = PixelFormat(COLOUR.mean, COLOUR.std, rgb=True, pad=0.5 if same else 0.0)
    renormalize, images = Renormalize(student, teacher), torch.full((2, 3, 4, 6), 0.25)
    images[0, :, 3:] = images[0, :, :, 4:] = 0.5
    samples = [SimpleNamespace(metainfo=dict(img_shape=shape)) for shape in ((3, 4), (4, 6))]
    before, found = images.clone(), renormalize(images, samples)
    assert renormalize.same is same and (renormalize.description == 'same as student') is same
    assert (found is images) is same and torch.equal(images, before)
    if not same:
        assert found[0, :, :3, :4].eq(0.25).all() and found[1].eq(0.25).all()
        assert found[0, :, 3:].eq(0).all() and found[0, :, :, 4:].eq(0).all()


def test_formats_that_differ_otherwise_are_not_the_same():
    for other in (
        PixelFormat(COLOUR.mean[::-1], COLOUR.std[::-1], rgb=False),
        PixelFormat((123.0, 116.0, 103.5), COLOUR.std, rgb=True),
        PixelFormat(COLOUR.mean, (58.0, 57.0, 57.0), rgb=True),
    ):
        found = Renormalize(COLOUR, other)
        assert not found.same and str(other) in found.description
    assert Renormalize(COLOUR, COLOUR).same


def test_images_that_something_unseen_has_scaled():
    raw = PixelFormat(seen=(-2.1, 2.6))
    with pytest.raises(DistillError, match=r'lie between -2\.10 and 2\.60 instead of 0 and 255') as error:
        Renormalize(raw, COLOUR)
    assert len(str(error.value)) < 400
    # A teacher of the same kind gets them as they are; dark pictures of another one are pictures.
    assert Renormalize(raw, PixelFormat()).same
    for seen in ((0.0, 200.0), (0.0, 0.0), None):
        Renormalize(PixelFormat(seen=seen), COLOUR)


def test_formats_that_somebody_writes():
    read = PixelFormat.from_options
    assert read(dict(mean=[1, 2, 3], std=(4.0, 5.0, 6.0), rgb=True, pad=7), 'x') == PixelFormat(
        (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), True, 7.0
    )
    assert read(dict(mean=0, std=[4, 5, 6, 7]), 'x') == PixelFormat((0.0,) * 4, (4.0, 5.0, 6.0, 7.0))
    assert read(COLOUR, 'x') is COLOUR
    for bad, match in (
        ('rgb', r'x must be dict\(mean='),
        (dict(mean=0, std=1, bgr=True), r"x has no option 'bgr'"),
        (dict(mean=0, rgb=True), r'x\.std must be a number or one for each channel, got None'),
        (dict(mean='0', std=1, rgb=True), r"x\.mean must be a number or one for each channel, got '0'"),
        (dict(mean=(0, 1), std=(1, 2, 3)), 'x: mean has 2 numbers and std 3'),
        (dict(mean=0, std=(1, 0, 1), rgb=True), r'x\.std must not be 0'),
        (dict(mean=0, std=1), r'x\.rgb must be True \(RGB\) or False'),
        (dict(mean=(0, 0, 0), std=1, rgb='yes'), r"x\.rgb must be True .*got 'yes'"),
    ):
        with pytest.raises(DistillError, match=match):
            read(bad, 'x')


@pytest.mark.parametrize('size', [(50, 73), (64, 33), (64, 96)])
def test_padding_and_what_is_cut_off(size):
    padding, images = Padding(32, 5.0), torch.rand(2, 3, *size)
    padded = padding(images)
    assert (padded is images) == (size == (64, 96))
    assert padded.shape[-2:] == tuple(-(-side // 32) * 32 for side in size)
    assert torch.equal(padded[..., : size[0], : size[1]], images) and padded[..., size[0] :, :].eq(5).all()
    sizes = dict(padded=tuple(padded.shape[-2:]), inside=size)
    for stride in (1, 4, 16):
        grid = [side // stride for side in sizes['padded']]
        inside = [-(-side // stride) for side in size]
        assert list(padding.cut(torch.rand(2, 7, *grid), **sizes).shape) == [2, 7, *inside]
        assert list(padding.cut(torch.rand(2, *grid, 7), **sizes).shape) == [2, *inside, 7]
    # As coarse as the padding: there is a cell for every part of the picture, and what is no map stays.
    for other in ((2, 7, *(side // 32 for side in sizes['padded'])), (2, 300, 4), (2, 10), (2, 3, 197, 197)):
        assert padding.cut(torch.rand(other), **sizes).shape == other


@pytest.mark.parametrize('size', [(50, 73), (64, 64)])
def test_cells_of_a_padded_teacher_lie_where_they_would(size):
    """The maps of the picture alone, but for what padding says at its border."""

    class Pyramid(torch.nn.Module):
        """Merges its levels cell by cell, so sides must be multiples of 16."""

        def __init__(self):
            super().__init__()
            self.fine, self.coarse = torch.nn.AvgPool2d(4), torch.nn.AvgPool2d(4)
            self.both = torch.nn.Identity()

        def forward(self, x):
            fine = self.fine(x)
            return self.both((fine + self.coarse(fine).repeat_interleave(4, 2).repeat_interleave(4, 3), fine))

    model = Pyramid()
    teacher = FrozenTeacher(
        model, lambda m, x, samples, modules: m(x), lambda x, samples: x, name='pyramid', padding=Padding(16, 0.0)
    )
    images = torch.rand(2, 3, *size)
    capture = teacher.outputs(images, None, ['both', 'coarse'])
    fine = capture.call('both').output[1]
    assert capture.image_size == size and fine.shape[-2:] == tuple(-(-side // 4) for side in size)
    whole = tuple(side // 4 for side in size)
    torch.testing.assert_close(fine[..., : whole[0], : whole[1]], model.fine(images))
    assert capture.call('coarse').output.shape[-2:] == tuple(-(-side // 16) for side in size)
