"""How much each image counts: against the formulas, in float64."""

import math

import pytest
import torch

from kd_plugins.distiller import build_terms
from kd_plugins.distiller.weighting import build_weighting
from kd_plugins.errors import DistillError
from kd_plugins.losses import kl_div
from kd_plugins.predictions import ClassPredictions
from tests.unit.distiller.test_iteration import IMAGES, Net, session_of

GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (3 * torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
MIXED = torch.rand(6, 4, generator=GENERATOR, dtype=torch.float64)
MIXED /= MIXED.sum(-1, keepdim=True)


def weights(kind, target=None, teacher=TEACHER, student=STUDENT, activation='softmax'):
    found = build_weighting(kind, 'samples')
    pair = (ClassPredictions(logits, activation) for logits in (student, teacher))
    return found(*pair, target).double()


def probabilities(teacher=TEACHER):
    return [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in teacher.tolist()]


def test_confidence():
    expected = torch.tensor([max(row) for row in probabilities()], dtype=torch.float64)
    torch.testing.assert_close(weights('confidence'), expected, rtol=1e-6, atol=1e-7)


def test_entropy():
    expected = [1 + sum(p * math.log(p) for p in row) / math.log(4) for row in probabilities()]
    torch.testing.assert_close(weights('entropy'), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    open_choice, sure = torch.zeros(6, 4), 100 * torch.eye(4)[LABELS]
    assert weights('entropy', teacher=open_choice).abs().max() < 1e-6
    assert weights('entropy', teacher=sure).min() > 1 - 1e-6


def test_agreement():
    choice = TEACHER.argmax(-1)
    assert weights('agreement', LABELS).tolist() == (choice == LABELS).double().tolist()
    assert 0 < weights('agreement', LABELS).sum() < 6
    torch.testing.assert_close(weights('agreement', MIXED), MIXED[range(6), choice], rtol=1e-6, atol=1e-7)


def test_weighted_soft_labels():
    losses = [
        [-math.log(row[label]) for row, label in zip(probabilities(z), LABELS.tolist(), strict=True)]
        for z in (STUDENT, TEACHER)
    ]
    expected = [1 - math.exp(-ours / theirs) for ours, theirs in zip(*losses, strict=True)]
    torch.testing.assert_close(
        weights('wsl', LABELS), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize('kind', ['confidence', 'entropy', 'agreement', 'wsl'])
def test_refused_where_classes_do_not_exclude_each_other(kind):
    with pytest.raises(DistillError, match=f"samples='{kind}' .*whose classes exclude each other"):
        weights(kind, LABELS, activation='sigmoid')


@pytest.mark.parametrize('kind', ['agreement', 'wsl'])
def test_refused_without_labels(kind):
    with pytest.raises(DistillError, match='compares with the labels of whole images'):
        weights(kind)


@pytest.mark.parametrize('kind', ['confidence', 'entropy', 'agreement', 'wsl'])
def test_a_batch_is_the_weighted_mean_of_its_images(kind):
    student, teacher = Net(0), Net(1)
    session = session_of(
        student, teacher, loss=dict(type='KLDivLoss'), student='logits', teacher='logits', samples=kind
    )
    labels = torch.tensor([1, 4])
    session.host.targets = lambda inputs, samples: labels
    session.check(IMAGES)
    with session.capture() as capture:
        student(IMAGES)
    value = session.losses(capture, IMAGES, None)['loss_kd_term']
    each = [kl_div(student.scores[i : i + 1], teacher.scores[i : i + 1]).item() for i in range(2)]
    expected = weights(kind, labels, teacher.scores, student.scores)
    assert value.item() == pytest.approx((expected * torch.tensor(each)).mean().item(), rel=1e-5)


def test_labels_are_those_of_the_classes_that_both_know():
    """Of five classes the teacher knows three, in another order; an image of another class does not count."""
    student, teacher = Net(0), Net(1)
    session = session_of(
        student, teacher, loss=dict(type='KLDivLoss'), student='logits', teacher='logits', samples='agreement'
    )
    ours, theirs = (4, 1, 2), (0, 3, 2)
    choice = teacher.scores[:, list(theirs)].argmax(-1)
    # The first image is labelled as the teacher has it, the second with a class that only the student knows.
    labels = torch.tensor([ours[choice[0]], 3])
    session.host.targets = lambda inputs, samples: labels
    session.set_classes((ours, theirs))
    session.check(IMAGES)
    with session.capture() as capture:
        student(IMAGES)
    value = session.losses(capture, IMAGES, None)['loss_kd_term']
    expected = kl_div(student.scores[:1, list(ours)], teacher.scores[:1, list(theirs)])
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_they_are_options_of_a_term():
    term = dict(loss=dict(type='KLDivLoss'), student='logits', teacher='logits', samples='entropy')
    assert str(build_terms(dict(a=term))['a'].samples) == "one minus the teacher's entropy"
    with pytest.raises(DistillError, match="did you mean 'entropy'"):
        build_terms(dict(a=dict(term, samples='entropie')))
