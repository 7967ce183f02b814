"""ofa against the formula in plain loops, and its relation to the authors' code."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from kd_plugins.errors import DistillError
from kd_plugins.losses import OFALoss, kl_div, ofa


def softmax(values, temperature):
    exponents = [math.exp(v / temperature) for v in values]
    return [e / sum(exponents) for e in exponents]


def by_hand(student, teacher, target, gamma, temperature):
    rows = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        others = sum(p_t[c] * math.log(p_s[c]) for c in range(len(s)) if c != y)
        rows.append(-((1 + p_t[y]) ** gamma) * math.log(p_s[y]) - others)
    return temperature**2 * sum(rows) / len(rows)


def of_the_authors(student, teacher, target, eps, temperature):
    """The released code's formula, in its terms: a mask of the true class, no T^2."""
    mask = one_hot(target, student.shape[-1])
    enhanced = ((teacher / temperature).softmax(-1) + mask) ** eps
    return ((mask - enhanced) * (student / temperature).softmax(-1).log()).sum(-1).mean()


@pytest.fixture
def triple():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.tensor([0, 1, 2, 3, 4, 4])


SETTINGS = pytest.mark.parametrize('gamma, temperature', [(1.0, 1.0), (1.5, 1.0), (1.3, 4.0), (0.5, 2.0)])


@SETTINGS
def test_formula(triple, gamma, temperature):
    expected = by_hand(*triple, gamma, temperature)
    assert ofa(*triple, gamma=gamma, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)
    assert OFALoss(gamma, temperature)(*triple).item() == pytest.approx(expected, rel=1e-12)


@SETTINGS
def test_form_of_the_authors(triple, gamma, temperature):
    expected = temperature**2 * of_the_authors(*triple, gamma, temperature)
    value = OFALoss(gamma, temperature, form='author')(*triple)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_gamma_1_is_cross_entropy_and_classic_kd(triple):
    student, teacher, target = triple
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean()
    kd = kl_div(student, teacher, temperature=1.0) + entropy
    assert ofa(*triple, form='author').item() == pytest.approx(kd.item(), rel=1e-12)
    assert ofa(*triple).item() == pytest.approx((kd + cross_entropy(student, target)).item(), rel=1e-12)


def test_gamma_enhances_the_true_class_the_more_the_surer_the_teacher_is():
    """Of two images, the gradient at the true class grows with gamma more where the teacher is certain."""
    teacher = torch.tensor([[4.0, 0.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    growth = []
    for form in ('paper', 'author'):
        gradients = []
        for gamma in (1.0, 2.0):
            student = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
            ofa(student, teacher, torch.zeros(2, dtype=torch.long), gamma=gamma, form=form).backward()
            gradients.append(student.grad[:, 0])
        growth.append(gradients[1] - gradients[0])
        assert (growth[-1] < 0).all() and growth[-1][0] < growth[-1][1]


@pytest.mark.parametrize('form', ['paper', 'author'])
def test_least_where_the_student_has_the_shares_of_the_factors(triple, form):
    student, teacher, target = triple
    p, mask = teacher.softmax(-1), one_hot(target, 5)
    factors = (1 + p) ** 1.5 * mask + p * (1 - mask) if form == 'paper' else (p + mask) ** 1.5 - mask
    best = (factors / factors.sum(-1, keepdim=True)).log().requires_grad_()
    least = ofa(best, teacher, target, gamma=1.5, form=form)
    least.backward()
    assert best.grad.abs().max() < 1e-12 and least > 0
    for other in (student, teacher, best.detach() + 0.01 * student):
        assert ofa(other, teacher, target, gamma=1.5, form=form) > least


# ------------------------------------------------------------------ soft labels
@pytest.mark.parametrize('form', ['paper', 'author'])
def test_soft_labels_are_an_expectation(triple, form):
    student, teacher, first = triple
    second = first.roll(1)
    share = torch.tensor([0.9, 0.75, 0.5, 0.3, 0.2, 0.1], dtype=torch.float64)
    soft = share[:, None] * one_hot(first, 5) + (1 - share)[:, None] * one_hot(second, 5)
    expected = 0.0
    for i in range(6):
        one = [ofa(student[i], teacher[i], y[i], gamma=1.5, form=form) for y in (first, second)]
        expected += (share[i] * one[0] + (1 - share[i]) * one[1]) / 6
    assert ofa(student, teacher, soft, gamma=1.5, form=form).item() == pytest.approx(expected.item(), rel=1e-12)
    smoothed = 0.8 * soft + 0.2 / 5
    assert ofa(student, teacher, smoothed, gamma=1.5, form=form).item() == pytest.approx(expected.item(), rel=1e-12)


def test_smoothed_labels_are_the_hard_ones_as_in_the_authors_code(triple):
    student, teacher, target = triple
    smoothed = torch.full((6, 5), 0.02, dtype=torch.float64) + 0.9 * one_hot(target, 5)
    assert ofa(student, teacher, smoothed).item() == pytest.approx(ofa(*triple).item(), rel=1e-12)


def test_mixed_labels_of_two_classes_keep_their_shares(triple):
    """There a floor cannot be told from a share, and taking it off would leave the larger class alone."""
    student, teacher, target = triple[0][:, :2], triple[1][:, :2], triple[2] % 2
    soft = 0.3 + 0.4 * one_hot(target, 2).double()
    hard = [ofa(student, teacher, y, gamma=2.0).item() for y in (target, 1 - target)]
    assert ofa(student, teacher, soft, gamma=2.0).item() == pytest.approx(0.7 * hard[0] + 0.3 * hard[1], rel=1e-12)


def test_leading_dimensions_are_positions(triple):
    student, teacher, target = triple
    value = ofa(student.reshape(2, 3, 5), teacher.reshape(2, 3, 5), target.reshape(2, 3))
    assert value.item() == pytest.approx(ofa(*triple).item(), rel=1e-12)


def test_labels_that_do_not_fit_are_refused(triple):
    student, teacher, target = triple
    with pytest.raises(DistillError, match=r'OFALoss.*needs labels; use KLDivLoss'):
        OFALoss()(student, teacher)
    for wrong in (target[:-1], target.float(), one_hot(target, 5)):
        with pytest.raises(DistillError, match='one class index per position'):
            ofa(student, teacher, wrong)
    with pytest.raises(DistillError, match=r'sum to 1.*got a sum of 2 .*BinaryKLDivLoss'):
        ofa(student, teacher, 2.0 * one_hot(target, 5))
