"""Label maps are drawn in the data set's colours, and pixels that no metric counts neither coloured nor scored."""

import math

import numpy as np
import pytest
from PIL import Image

from kd_plugins.lab.comparison.segmentations import IGNORED, LARGEST, STRIPES, Segmentations, colour, image_iou

PALETTE = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]


def test_iou_of_an_image():
    truth = np.array([[0, 0, 1, 1]])
    assert image_iou(truth, truth) == 1
    # Class 0: 2 of 3 pixels, class 1: 1 of 2.
    assert image_iou(np.array([[0, 0, 0, 1]]), truth) == pytest.approx((2 / 3 + 1 / 2) / 2)
    # A class that is nowhere to be seen counts where it is predicted.
    assert image_iou(np.array([[0, 0, 1, 2]]), truth) == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_pixels_that_are_not_counted():
    truth = np.array([[0, IGNORED, 1, IGNORED]])
    assert image_iou(np.array([[0, 2, 1, 1]]), truth) == 1
    assert math.isnan(image_iou(np.array([[0]]), np.array([[IGNORED]])))


def test_colours():
    picture = np.full((8, 8, 3), 100, np.uint8)
    labels = np.zeros((8, 8), int)
    labels[:, 4:] = 1
    truth = labels.copy()
    truth[:2] = IGNORED
    cell = colour(labels, picture, truth, PALETTE)
    black, red = cell[5, 1], cell[5, 6]
    assert black[0] == black[1] == black[2] < red[0] and red[1] == red[2] == black[1], 'class colour over grey'
    assert {tuple(c) for c in cell[:2].reshape(-1, 3)} == {tuple(c) for c in STRIPES.astype(int)}


def test_large_images_are_drawn_smaller():
    side = 2 * LARGEST + 1
    labels = np.zeros((side // 2, side), int)
    cell = colour(labels, np.zeros((side // 2, side, 3), np.uint8), labels, PALETTE)
    assert max(cell.shape) <= LARGEST


def test_legend_names_what_is_seen(tmp_path):
    picture = drawn(tmp_path)
    names = [name for name, _ in picture._legend()]
    assert names == ['road', 'car', 'not counted'], 'in the order of the classes, without those that do not occur'


def test_picture_is_written_and_small(tmp_path):
    drawn(tmp_path).draw(tmp_path / 's.png')
    with Image.open(tmp_path / 's.png') as image:
        assert image.width > 500
    assert (tmp_path / 's.png').stat().st_size < 400_000


def drawn(folder):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(folder / 'scene.png')
    truth = rng.integers(0, 2, (48, 64))
    truth[:5] = IGNORED
    return Segmentations(
        images=['scene'],
        files={'scene': str(folder / 'scene.png')},
        truth={'scene': truth},
        found={name: {'scene': rng.integers(0, 2, (48, 64))} for name in ('teacher', 'plain')},
        classes=('road', 'car', 'tree'),
        palette=PALETTE,
    )
