"""kl_div against Hinton's and Sun's formulas, computed by hand."""

import math

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import KLDivLoss, kl_div


def softmax(values, temperature):
    top = max(values)
    exponents = [math.exp((v - top) / temperature) for v in values]
    return [e / sum(exponents) for e in exponents]


def by_hand(student, teacher, temperature):
    """T^2 times the mean over the rows of sum_c p_t log(p_t / p_s); nested lists (N, C)."""
    rows = []
    for s, t in zip(student, teacher, strict=True):
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        rows.append(sum(b * math.log(b / a) for a, b in zip(p_s, p_t, strict=True)))
    return temperature**2 * sum(rows) / len(rows)


def standardized(row):
    mean = sum(row) / len(row)
    std = math.sqrt(sum((v - mean) ** 2 for v in row) / len(row))
    return [(v - mean) / std for v in row]


def random(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_formula(temperature):
    student, teacher = random(4, 7), random(4, 7, seed=1)
    expected = by_hand(student.tolist(), teacher.tolist(), temperature)
    assert kl_div(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)
    assert KLDivLoss(temperature)(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_formula_with_numbers():
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2."""
    value = kl_div(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), temperature=1.0)
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


def test_gradient_is_t_times_the_difference_of_probabilities():
    student, teacher = random(4, 7).requires_grad_(), random(4, 7, seed=1)
    kl_div(student, teacher, temperature=5.0).backward()
    expected = 5.0 * ((student / 5).softmax(-1) - (teacher / 5).softmax(-1)) / 4
    torch.testing.assert_close(student.grad, expected.detach())


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_standardize(temperature):
    student, teacher = random(4, 7), random(4, 7, seed=1)
    expected = by_hand(*([standardized(r) for r in x.tolist()] for x in (student, teacher)), temperature)
    value = kl_div(student, teacher, temperature=temperature, standardize=True)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_standardize_ignores_shift_and_range():
    teacher = random(4, 7)
    assert kl_div(0.3 * teacher + 5, teacher, standardize=True).item() == pytest.approx(0, abs=1e-10)
    assert kl_div(0.3 * teacher + 5, teacher).item() > 1e-2


def test_standardize_of_constant_logits_has_a_finite_gradient():
    student = torch.zeros(2, 5, requires_grad=True)
    value = kl_div(student, torch.randn(2, 5), standardize=True)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()


def test_mean_over_all_leading_positions():
    student, teacher = random(2, 3, 4, 7), random(2, 3, 4, 7, seed=1)
    flat = kl_div(student.reshape(-1, 7), teacher.reshape(-1, 7))
    assert kl_div(student, teacher).item() == pytest.approx(flat.item(), rel=1e-12)


def test_not_divided_by_the_class_count():
    """Splitting every class into two of half the probability leaves the divergence as it is."""
    student, teacher = random(4, 7), random(4, 7, seed=1)
    halves = (torch.cat([x, x], -1) for x in (student, teacher))
    value = kl_div(*halves, temperature=1.0)
    assert value.item() == pytest.approx(kl_div(student, teacher, temperature=1.0).item(), rel=1e-12)


def test_large_logit_gap_has_the_exact_value():
    """log(softmax(x)) would be infinite: the student's probability of the teacher's class is e^-200."""
    student, teacher = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert kl_div(student, teacher, temperature=1.0).item() == pytest.approx(200.0)


# ------------------------------------------------------------------ another temperature for the teacher
@pytest.mark.parametrize('temperature, teacher_temperature', [(1.0, 3.0), (4.0, 1.5), (2.0, 2.0)])
@pytest.mark.parametrize('standardize', [False, True])
def test_teacher_temperature(temperature, teacher_temperature, standardize):
    """T^2 is that of the student."""
    student, teacher = random(4, 7), random(4, 7, seed=1)
    rows = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        if standardize:
            s, t = standardized(s), standardized(t)
        p_s, p_t = softmax(s, temperature), softmax(t, teacher_temperature)
        rows.append(sum(b * math.log(b / a) for a, b in zip(p_s, p_t, strict=True)))
    expected = temperature**2 * sum(rows) / 4
    value = kl_div(
        student, teacher, temperature=temperature, teacher_temperature=teacher_temperature, standardize=standardize
    )
    assert value.item() == pytest.approx(expected, rel=1e-9)
    loss = KLDivLoss(temperature, standardize, teacher_temperature)
    assert torch.equal(loss(student, teacher), value)


def test_with_a_teacher_temperature_zero_is_at_equal_softened_probabilities():
    teacher = random(4, 7)
    assert kl_div(0.5 * teacher, teacher, temperature=2.0, teacher_temperature=4.0).item() == pytest.approx(
        0, abs=1e-12
    )
    assert kl_div(teacher, teacher, temperature=2.0, teacher_temperature=4.0).item() > 1e-2


def test_the_teacher_follows_the_temperature_unless_it_has_its_own():
    """A schedule sets ``temperature`` between the calls."""
    student, teacher = random(4, 7), random(4, 7, seed=1)
    follows, own = KLDivLoss(4.0), KLDivLoss(4.0, teacher_temperature=4.0)
    assert torch.equal(follows(student, teacher), own(student, teacher))
    follows.temperature = own.temperature = 1.0
    assert torch.equal(follows(student, teacher), kl_div(student, teacher, temperature=1.0))
    assert torch.equal(own(student, teacher), kl_div(student, teacher, temperature=1.0, teacher_temperature=4.0))


@pytest.mark.parametrize('value', [0, -1.0, math.nan, math.inf, '1', True])
def test_teacher_temperature_is_checked(value):
    for call in (
        lambda: KLDivLoss(teacher_temperature=value),
        lambda: kl_div(*[random(1, 2)] * 2, teacher_temperature=value),
    ):
        with pytest.raises(DistillError, match='teacher_temperature') as error:
            call()
        assert repr(value) in str(error.value)
