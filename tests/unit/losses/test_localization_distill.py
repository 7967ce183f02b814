"""localization_distill against the paper's formula in plain loops."""

import math

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import LocalizationDistillLoss, localization_distill


def per_position(student, teacher, tau):
    """(B, A) lists: tau^2 times the mean over the sides of sum_r p_t log(p_t / p_s)."""

    def softmax(values):
        exponents = [math.exp(v / tau) for v in values]
        return [e / sum(exponents) for e in exponents]

    def divergence(s, t):
        return sum(p * math.log(p / q) for q, p in zip(softmax(s), softmax(t), strict=True))

    return [
        [tau**2 * sum(map(divergence, sides_s, sides_t)) / 4 for sides_s, sides_t in zip(image_s, image_t, strict=True)]
        for image_s, image_t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]


def mean(loss):
    values = [v for image in loss for v in image]
    return sum(values) / len(values)


@pytest.fixture
def pair(predictions):
    return predictions(seed=0), predictions(seed=1)


@pytest.mark.parametrize('temperature', [1.0, 10.0])
def test_formula_uniform(pair, temperature):
    student, teacher = pair
    expected = mean(per_position(student.dist, teacher.dist, temperature))
    value = localization_distill(student.dist, teacher.dist, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value = LocalizationDistillLoss(temperature, foreground=False)(student, teacher)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_formula_with_foreground(pair, weighted_mean):
    student, teacher = pair
    teacher = teacher.replace(obj=teacher.obj - torch.tensor([6.0, 0.0]).reshape(2, 1, 1))
    weight = teacher.cls.sigmoid().amax(-1) * teacher.obj[..., 0].sigmoid()
    assert weight[0].sum() < 1 < weight[1].sum()
    expected = weighted_mean(per_position(student.dist, teacher.dist, 10.0), weight.tolist())
    assert LocalizationDistillLoss()(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert localization_distill(student.dist, teacher.dist, weight).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_is_tau_times_the_difference_of_probabilities(pair):
    student, teacher = pair[0].dist.requires_grad_(), pair[1].dist
    localization_distill(student, teacher, temperature=10.0).backward()
    expected = 10.0 * ((student / 10).softmax(-1) - (teacher / 10).softmax(-1)) / (2 * 8 * 4)
    torch.testing.assert_close(student.grad, expected.detach())


def test_not_divided_by_the_number_of_bins(pair):
    """Splitting every bin into two of half the probability leaves the divergence as it is."""
    student, teacher = (p.dist for p in pair)
    halves = (torch.cat([x, x], -1) for x in (student, teacher))
    expected = localization_distill(student, teacher, temperature=1.0).item()
    assert localization_distill(*halves, temperature=1.0).item() == pytest.approx(expected, rel=1e-12)


def test_repeated_positions_change_nothing(pair):
    student, teacher = (p.dist for p in pair)
    weight = torch.rand(2, 8, dtype=torch.float64) + 0.5
    for w, w2 in ((None, None), (weight, torch.cat([weight, weight], 1))):
        twice = localization_distill(torch.cat([student, student], 1), torch.cat([teacher, teacher], 1), w2)
        assert twice.item() == pytest.approx(localization_distill(student, teacher, w).item(), rel=1e-12)


@pytest.mark.parametrize('role', ['student', 'teacher'])
def test_head_without_bins_is_refused(pair, role):
    pair = dict(zip(('student', 'teacher'), pair, strict=True))
    pair[role] = pair[role].replace(dist=None)
    with pytest.raises(DistillError, match=rf"{role}'s does not; .*YOLOLogitLoss\(obj_weight=0, cls_weight=0\)"):
        LocalizationDistillLoss()(**pair)
    pair[role] = pair[role].replace(absent={'dist': 'RTMDet regresses distances'})
    with pytest.raises(DistillError, match=r'does not \(RTMDet regresses distances\); compare'):
        LocalizationDistillLoss()(**pair)


def test_different_bins_are_refused(predictions):
    with pytest.raises(DistillError, match=r'\(2, 8, 4, 5\).*\(2, 8, 4, 17\); .*YOLOLogitLoss'):
        LocalizationDistillLoss()(predictions(), predictions(bins=17))
