"""dkd against the paper's formula in plain loops, and its relation to classic KD."""

import math

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import DKDLoss, dkd, kl_div


def softmax(values, temperature):
    exponents = [math.exp(v / temperature) for v in values]
    return [e / sum(exponents) for e in exponents]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def by_hand(student, teacher, target, alpha, beta, temperature):
    rows = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        target_part = kl((p_t[y], 1 - p_t[y]), (p_s[y], 1 - p_s[y]))
        others = [i for i in range(len(s)) if i != y]
        other_part = kl([p_t[i] / (1 - p_t[y]) for i in others], [p_s[i] / (1 - p_s[y]) for i in others])
        rows.append(alpha * target_part + beta * other_part)
    return temperature**2 * sum(rows) / len(rows)


@pytest.fixture
def triple():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.tensor([0, 1, 2, 3, 4, 4])


@pytest.mark.parametrize('alpha, beta, temperature', [(1.0, 8.0, 4.0), (1.0, 0.0, 1.0), (0.0, 2.0, 2.0)])
def test_formula(triple, alpha, beta, temperature):
    expected = by_hand(*triple, alpha, beta, temperature)
    value = dkd(*triple, alpha=alpha, beta=beta, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert DKDLoss(alpha, beta, temperature)(*triple).item() == pytest.approx(expected, rel=1e-12)


def test_one_sample_with_beta_of_the_paper_is_classic_kd(triple):
    """alpha 1, beta 1 - p_y is the KL divergence (equation 5)."""
    for s, t, y in zip(*triple, strict=True):
        beta = 1 - t.div(3).softmax(-1)[y].item()
        value = dkd(s[None], t[None], y[None], alpha=1.0, beta=beta, temperature=3.0)
        assert value.item() == pytest.approx(kl_div(s[None], t[None], temperature=3.0).item(), rel=1e-10)


def test_leading_dimensions_are_positions(triple):
    student, teacher, target = triple
    flat = dkd(*triple)
    value = dkd(student.reshape(2, 3, 5), teacher.reshape(2, 3, 5), target.reshape(2, 3))
    assert value.item() == pytest.approx(flat.item(), rel=1e-12)


def test_confident_teacher_is_finite_and_exact():
    """1 - p_y underflows in float32; the share among the other classes does not."""
    student, teacher = torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([[300.0, 0.0, 3.0]])
    value = dkd(student, teacher, torch.tensor([0]), alpha=0.0, beta=1.0, temperature=1.0)
    p, q = softmax([0.0, 3.0], 1.0), softmax([3.0, 0.0], 1.0)
    assert value.item() == pytest.approx(kl(p, q), rel=1e-5)


def test_no_label_is_refused(triple):
    with pytest.raises(DistillError, match='needs labels'):
        DKDLoss()(*triple[:2])


def test_labels_that_do_not_fit_are_refused(triple):
    student, teacher, target = triple
    for wrong in (target[:-1], target.float(), target[:, None]):
        with pytest.raises(DistillError, match='one class index per position'):
            dkd(student, teacher, wrong)


def test_a_single_class_and_weights_of_zero_are_refused():
    one = torch.zeros(2, 1)
    with pytest.raises(DistillError, match='at least 2 classes, got 1'):
        dkd(one, one, torch.zeros(2, dtype=torch.long))
    with pytest.raises(DistillError, match='both 0'):
        DKDLoss(0, 0)
