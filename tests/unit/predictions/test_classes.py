"""The canonical form of classifiers: reading, alignment by name, labels of the shared classes."""

import pytest
import torch
from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.losses.base import Declaration
from kd_plugins.predictions import (
    ClassLogits,
    ClassPredictions,
    DensePredictions,
    PixelPredictions,
    align_classes,
    find_reader,
    map_class_labels,
    read,
    readable,
)


class Doubling(ClassLogits):
    """What passes through means something else."""

    def predict(self, logits):
        return 2 * logits


def predictions(*shape, seed=0, **options):
    return ClassPredictions(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), **options)


def test_logits_pass_unchanged_and_are_read():
    head, logits = ClassLogits(4, 'sigmoid'), torch.randn(3, 4, requires_grad=True)
    assert head(logits) is logits
    found = read(head, head(logits), form=ClassPredictions)
    assert found.logits is logits and found.activation == 'sigmoid' and found.num_classes == 4
    assert not found.detach().logits.requires_grad
    assert not list(head.state_dict())


def test_forms_are_kept_apart():
    assert not readable(ClassLogits()) and not readable(ClassLogits(), PixelPredictions)
    with pytest.raises(DistillError, match='it is a classification head, but this loss compares detection heads'):
        find_reader(ClassLogits(), DensePredictions)
    with pytest.raises(DistillError, match=r"register_reader\('Linear', form=ClassPredictions\)"):
        find_reader(nn.Linear(1, 1), ClassPredictions)
    with pytest.raises(DistillError, match=r'Doubling\.predict makes its outputs mean something else'):
        find_reader(Doubling(), ClassPredictions)


@pytest.mark.parametrize('value', [torch.zeros(3), torch.zeros(3, 4, 5), None])
def test_only_one_row_per_image(value):
    with pytest.raises(DistillError, match=r'must be \(B, C\), got'):
        ClassPredictions(value)


def test_unknown_activation():
    with pytest.raises(DistillError, match=r"activation must be one of .*got 'relu'"):
        predictions(2, 3, activation='relu')


def test_alignment_selects_and_orders_both():
    ours, theirs = predictions(2, 4), predictions(2, 5, seed=1)
    student, teacher = align_classes(ours, theirs, ([3, 0], [1, 4]))
    assert torch.equal(student.logits, ours.logits[:, [3, 0]])
    assert torch.equal(teacher.logits, theirs.logits[:, [1, 4]])
    same = align_classes(ours, ours)
    assert same[0] is ours


def test_what_cannot_be_aligned():
    with pytest.raises(DistillError, match='predicts for 2 images and the teacher for 3'):
        align_classes(predictions(2, 4), predictions(3, 4))
    with pytest.raises(DistillError, match=r'predicts 4 classes and the teacher 5: give the names .* teacher\.classes'):
        align_classes(predictions(2, 4), predictions(2, 5))


def test_labels_of_the_shared_classes():
    labels, keep = map_class_labels(torch.tensor([0, 1, 2, 3, 9]), [3, 0])
    assert keep.tolist() == [True, False, False, True, False]
    assert labels[keep].tolist() == [1, 0]


def test_mixed_labels_of_the_shared_classes():
    """An image counts when all that it was mixed from is known, label smoothing aside."""
    mixed = torch.tensor([[0.7, 0.0, 0.3, 0.0], [0.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    labels, keep = map_class_labels(0.9 * mixed + 0.1 / 4, [2, 0])
    assert keep.tolist() == [True, True, False]
    expected = (0.9 * mixed + 0.025)[:, [2, 0]]
    torch.testing.assert_close(labels, expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize('share', [0.0, 0.3, 0.5, 0.7, 0.99])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_an_image_that_is_mixed_with_an_unknown_class_does_not_count(share, smoothing):
    """Not even where most of it is of a class that the teacher knows."""
    mixed = torch.tensor([[share, 1 - share, 0.0], [share, 0.0, 1 - share]])
    _, keep = map_class_labels((1 - smoothing) * mixed + smoothing / 3, [0, 2])
    assert keep.tolist() == [False, True]


def test_a_loss_is_given_the_images_that_count():
    """Of three, the one that is 70 % of a known class is left out, with or without a target."""
    ours, theirs = predictions(3, 4), predictions(3, 4, seed=1)
    target = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.7, 0.0, 0.0, 0.3], [0.4, 0.0, 0.6, 0.0]])
    classes = ([0, 2], [1, 3])
    student, teacher = align_classes(ours, theirs, classes)
    found = []

    def loss(*given):
        found.append(given)
        return given[0].sum()

    for needs_target in (False, True):
        declared = Declaration(consumes='logits', needs_target=needs_target)
        ClassPredictions.compare(loss, declared, student, teacher, target, classes)
    for given in found:
        assert torch.equal(given[0], ours.logits[[0, 2]][:, [0, 2]])
        assert torch.equal(given[1], theirs.logits[[0, 2]][:, [1, 3]])
    assert len(found[0]) == 2
    torch.testing.assert_close(found[1][2], torch.tensor([[1.0, 0.0], [0.4, 0.6]]))


def test_gradients_reach_the_selected_classes_only():
    logits = torch.randn(2, 4, requires_grad=True)
    student, _ = align_classes(ClassPredictions(logits), predictions(2, 2), ([1, 2], [0, 1]))
    student.logits.sum().backward()
    assert logits.grad.abs().sum(0).tolist() == [0, 2, 2, 0]
