"""Segmentation logits: binary heads, classes by name, grids and labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.predictions import (
    PixelPredictions,
    align_pixels,
    common_grid,
    find_reader,
    map_labels,
    read,
    readable,
    readers,
    register_reader,
    register_unreadable,
)


def logits(classes=4, height=3, width=5, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64)


def test_a_binary_head_is_a_softmax_of_zero_and_its_logit():
    one = PixelPredictions(logits(1), 'sigmoid')
    two = one.two_classes()
    assert one.binary and one.num_classes == two.num_classes == 2 and two.activation == 'softmax'
    probability = two.logits.softmax(1)[:, 1]
    torch.testing.assert_close(probability, one.logits[:, 0].sigmoid())


def test_rows_of_class_logits_are_pixels():
    predictions = PixelPredictions(logits())
    rows = predictions.class_logits()
    assert rows.shape == (2, 15, 4)
    assert torch.equal(rows[1, 2 * 5 + 3], predictions.logits[1, :, 2, 3])


def test_two_binary_heads_stay_binary_and_a_mixed_pair_becomes_two_classes():
    binary, other = PixelPredictions(logits(1), 'sigmoid'), PixelPredictions(logits(1, seed=1), 'sigmoid')
    assert all(p.binary for p in align_pixels(binary, other))
    softmax = PixelPredictions(logits(2))
    for pair in ((binary, softmax), (softmax, binary)):
        assert [p.logits.shape[1] for p in align_pixels(*pair)] == [2, 2]


def test_classes_are_selected_and_ordered():
    student, teacher = PixelPredictions(logits(4)), PixelPredictions(logits(3, seed=1))
    ours, theirs = align_pixels(student, teacher, ([0, 3], [2, 1]))
    assert torch.equal(ours.logits, student.logits[:, [0, 3]])
    assert torch.equal(theirs.logits, teacher.logits[:, [2, 1]])


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(DistillError, match=r'4 classes and the teacher 3.*teacher\.classes'):
        align_pixels(PixelPredictions(logits(4)), PixelPredictions(logits(3)))
    with pytest.raises(DistillError, match=r"softmax and the teacher's a sigmoid"):
        align_pixels(PixelPredictions(logits(4)), PixelPredictions(logits(4), 'sigmoid'))
    with pytest.raises(DistillError, match='2 images and the teacher for 1'):
        align_pixels(PixelPredictions(logits()), PixelPredictions(logits(batch=1)))
    with pytest.raises(DistillError, match=r'\(2, 4, 15\)'):
        PixelPredictions(logits().flatten(2))
    with pytest.raises(DistillError, match='tuple'):
        PixelPredictions((logits(),))
    with pytest.raises(DistillError, match="'relu'"):
        PixelPredictions(logits(), 'relu')


@pytest.mark.parametrize('student, teacher', [((3, 5), (6, 10)), ((6, 10), (3, 5)), ((3, 5), (3, 5))])
def test_the_smaller_grid_is_resized(student, teacher):
    pair = PixelPredictions(logits(4, *student)), PixelPredictions(logits(4, *teacher, seed=1))
    found = common_grid(*pair)
    larger = max(student, teacher)
    assert all(tuple(p.logits.shape[-2:]) == larger for p in found)
    for before, after in zip(pair, found, strict=True):
        if tuple(before.logits.shape[-2:]) == larger:
            assert after is before
        else:
            # Bilinear with factor 2: the inner pixels mix 9/16, 3/16, 3/16 and 1/16 of their neighbours.
            a = before.logits[0, 0]
            mixed = 9 * a[0, 0] + 3 * a[0, 1] + 3 * a[1, 0] + a[1, 1]
            assert after.logits[0, 0, 1, 1].item() == pytest.approx(mixed.item() / 16, rel=1e-12)


def test_labels_of_classes_that_only_the_student_knows_are_ignored():
    target = torch.tensor([[[0, 1, 2, 3, 255]]])
    assert map_labels(target, [0, 3], (255,), 255).tolist() == [[[0, 255, 255, 1, 255]]]
    # Another order of the same classes.
    assert map_labels(target, [3, 2, 1, 0], (255,), 255).tolist() == [[[3, 2, 1, 0, 255]]]


def test_labels_that_the_head_ignores_are_ignored_by_the_loss():
    target = torch.tensor([[[0, 1, 2]]])
    assert map_labels(target, None, (2,), 255).tolist() == [[[0, 1, 255]]]
    assert map_labels(target, None, (None, 255), 255) is target
    assert map_labels(target, [0, 1, 2], (2,), 255).tolist() == [[[0, 1, 255]]]
    assert target.tolist() == [[[0, 1, 2]]], 'the batch itself must not change'


def test_a_class_whose_number_means_ignored_is_refused():
    with pytest.raises(DistillError, match=r'ignore_index=1 is also the number of a class.*255'):
        map_labels(torch.tensor([[[0, 1, 2]]]), [0, 2], (), 1)
    # A class that nobody compares may have the number 255.
    assert map_labels(torch.tensor([[[0, 255, -1]]]), [0], (), 255).tolist() == [[[0, 255, 255]]]


class Head(nn.Module):
    def forward(self, x):
        return x


class OtherHead(Head):
    def forward(self, x):
        return x + 1


class Predicting(Head):
    def predict(self, x):
        return x * 0


class Masks(Head):
    pass


class Deeper(Masks):
    pass


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(readers, '_readers', {})
    monkeypatch.setattr(readers, '_unreadable', {})
    register_reader(Head, form=PixelPredictions)(lambda head, outputs, *, training: PixelPredictions(outputs))
    register_unreadable('Masks', 'it has masks; tap the neck.')


def test_forms_are_kept_apart(own_registry):
    assert readable(Head(), PixelPredictions) and not readable(Head())
    assert torch.equal(read(Head(), logits(), form=PixelPredictions).logits, logits())
    with pytest.raises(DistillError, match='it is a segmentation head, but this loss compares detection heads'):
        find_reader(Head())
    with pytest.raises(DistillError, match='Supported heads: none yet'):
        find_reader(nn.Linear(1, 1))
    with pytest.raises(DistillError, match=r"register_reader\('Linear', form=PixelPredictions\)"):
        find_reader(nn.Linear(1, 1), PixelPredictions)


def test_a_forward_of_its_own_is_usual_but_a_prediction_of_its_own_is_not(own_registry):
    assert readable(OtherHead(), PixelPredictions)
    with pytest.raises(DistillError, match=r'Predicting\.predict makes its outputs mean something else'):
        find_reader(Predicting(), PixelPredictions)


def test_unreadable_heads_say_why(own_registry):
    for head in (Masks(), Deeper()):
        with pytest.raises(DistillError, match=r'cannot be read: it has masks; tap the neck\.'):
            find_reader(head, PixelPredictions)


def test_a_reader_that_returns_another_form_is_refused(own_registry):
    register_reader(Head)(lambda head, outputs, *, training: PixelPredictions(outputs))
    with pytest.raises(DistillError, match='returned PixelPredictions, not DensePredictions'):
        read(Head(), logits())
