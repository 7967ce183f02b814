"""Which images are drawn does not favour a model, and a cell says right or wrong by more than its colour."""

from collections import Counter

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from kd_plugins.lab.comparison import classifications
from kd_plugins.lab.comparison.classifications import LONGEST, RIGHT, WRONG, Classifications, Guess, choose_images


def test_half_of_the_images_are_disputed():
    teacher, plain = np.zeros(100, int), np.zeros(100, int)
    plain[:20] = 1
    groups = choose_images([teacher, plain], 4)
    assert list(groups) == [
        'The models disagree on 20 of 100 images; 4 of these:',
        'The models agree on 80 of 100 images; 4 of these:',
    ]
    assert list(groups.values()) == [[2, 7, 12, 17], [30, 50, 70, 90]], 'at even distances'


def test_no_model_is_favoured():
    # Nothing but the guesses counts, in any order: neither the truth nor which of them is distilled.
    guesses = np.random.default_rng(0).integers(0, 3, (4, 200))
    first = choose_images(guesses, 5)
    assert all(choose_images(guesses[order], 5) == first for order in ([1, 0, 2, 3], [3, 2, 1, 0]))


def test_groups_without_images_are_left_out():
    assert choose_images([[0, 1], [0, 1]], 5) == {'The models agree on 2 of 2 images; 2 of these:': [0, 1]}
    assert choose_images([[0, 1], [1, 0]], 1) == {'The models disagree on 2 of 2 images; 1 of these:': [0]}


@pytest.fixture
def drawn(monkeypatch):
    saved = []
    monkeypatch.setattr(classifications, 'save', lambda figure, path, **options: saved.append(figure))

    def draw(picture):
        picture.draw('nowhere.png')
        return saved[-1].axes[0]

    return draw


def picture(count=2, classes=('cat', 'dog'), size=(24, 32)):
    """A teacher that is always right and a student that is always wrong."""
    ids = [f'{i}.png' for i in range(count)]
    truth = {name: i % 2 for i, name in enumerate(ids)}
    return Classifications(
        groups={'The models disagree:': ids[: count // 2], 'The models agree:': ids[count // 2 :]},
        pictures={name: np.full((*size, 3), 100 + i, np.uint8) for i, name in enumerate(ids)},
        truth=truth,
        found={
            'teacher': {name: Guess(truth[name], 0.954) for name in ids},
            'plain': {name: Guess(1 - truth[name], 0.5) for name in ids},
        },
        classes=classes,
    )


def test_cells_are_right_or_wrong_by_colour_and_sign(drawn):
    axes = drawn(picture())
    words = [t.get_text() for t in axes.texts]
    # Of each image: its class, then a guess and a probability for each model.
    assert words[:8] == ['The models disagree:', 'teacher', 'plain', 'cat', '✓ cat', '95', '✗ dog', '50']
    assert words[8:] == ['The models agree:', 'teacher', 'plain', 'dog', '✓ dog', '95', '✗ cat', '50']
    assert [to_hex(p.get_facecolor()) for p in axes.patches] == [RIGHT[0], WRONG[0]] * 2


def test_pictures_keep_their_shape(drawn):
    left, right, bottom, top = drawn(picture(size=(30, 60))).images[0].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(2)


def test_what_does_not_fit_is_wrapped_and_cut(drawn):
    axes = drawn(picture(count=40, classes=('cat', 'a class with a very long name')))
    width, height = axes.figure.get_size_inches()
    assert width < 14 and len(axes.images) == 40
    assert max(len(t.get_text()) for t in axes.texts if t.get_text()[0] == '✓') == len('✓ ') + LONGEST
    assert all(0 <= x <= width and 0 <= y <= height for x, y in (t.get_position() for t in axes.texts))


def test_lines_are_of_the_same_length(drawn):
    axes = drawn(picture(count=20, classes=('cat', 'automobile')))  # 9 of a group's 10 would fit
    tops = Counter(round(image.get_extent()[3], 3) for image in axes.images)
    assert list(tops.values()) == [5, 5, 5, 5]


def test_picture_is_written_and_small(tmp_path):
    found = picture(count=20)
    found.draw(tmp_path / 'c.png')
    with Image.open(tmp_path / 'c.png') as image:
        assert image.width > 500
    assert (tmp_path / 'c.png').stat().st_size < 400_000
    assert found.images == [f'{i}.png' for i in range(20)]
