"""dkd against the paper's formula in plain loops, and its relation to classic KD."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

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


# ------------------------------------------------------------------ two classes
def test_two_classes_are_refused_where_beta_would_do_nothing():
    student, teacher, target = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    for labels in (target, one_hot(target, 2).float()):
        with pytest.raises(DistillError, match=r'With 2 classes.*beta=8.0.*KLDivLoss, or write beta=0'):
            DKDLoss()(student, teacher, labels)
        value = DKDLoss(beta=0)(student, teacher, labels)
        assert value.item() == pytest.approx(kl_div(student, teacher, temperature=4.0).item(), rel=1e-5)


# ------------------------------------------------------------------ soft labels
def mixture(first, second, share, classes=5, smoothing=0.0):
    mixed = share[:, None] * one_hot(first, classes) + (1 - share)[:, None] * one_hot(second, classes)
    return (1 - smoothing) * mixed + smoothing / classes


def expectation(student, teacher, first, second, share, **options):
    value = 0.0
    for i in range(len(student)):
        one, other = (dkd(student[i], teacher[i], y[i], **options).item() for y in (first, second))
        value += (share[i].item() * one + (1 - share[i].item()) * other) / len(student)
    return value


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('options', [{}, dict(alpha=2.0, beta=0.5, temperature=1.0)], ids=['default', 'other'])
def test_soft_labels_are_an_expectation_over_the_mixed_classes(triple, smoothing, options):
    student, teacher, first = triple
    second = first.roll(1)  # the last image's is its own class: one class, beside images of two
    share = torch.tensor([0.9, 0.75, 0.5, 0.3, 0.2, 0.6], dtype=torch.float64)
    value = dkd(student, teacher, mixture(first, second, share, smoothing=smoothing), **options)
    assert value.item() == pytest.approx(expectation(student, teacher, first, second, share, **options), rel=1e-12)
    mean = sum(dkd(student, teacher, y, **options).item() for y in (first, second)) / 2
    assert value.item() != pytest.approx(mean, rel=1e-3)


def test_one_hot_labels_are_the_hard_ones(triple):
    student, teacher, target = triple
    assert torch.equal(dkd(student, teacher, one_hot(target, 5).double()), dkd(*triple))
    smoothed = 0.9 * one_hot(target, 5).double() + 0.02
    assert dkd(student, teacher, smoothed).item() == pytest.approx(dkd(*triple).item(), rel=1e-12)


def test_soft_labels_as_timm_makes_them(triple):
    """In half precision too, in which the labels' sum is off."""
    mixup = pytest.importorskip('timm.data.mixup')
    student, teacher, target = (torch.cat([x, x]) for x in triple)
    soft = mixup.mixup_target(target, 5, lam=0.7, smoothing=0.1)
    share = torch.full((12,), 0.7, dtype=torch.float64)
    expected = expectation(student, teacher, target, target.flip(0), share)
    for dtype, rel in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        assert dkd(student, teacher, soft.to(dtype)).item() == pytest.approx(expected, rel=rel)


def test_soft_labels_of_positions_and_of_more_than_two_classes(triple):
    student, teacher, _ = triple
    soft = torch.tensor([[0.5, 0.3, 0.2, 0.0, 0.0], [0.0, 0.1, 0.2, 0.3, 0.4]] * 3, dtype=torch.float64)
    rows = [
        sum(q * dkd(student[i], teacher[i], torch.tensor(k)).item() for k, q in enumerate(soft[i].tolist()))
        for i in range(6)
    ]
    value = dkd(student.reshape(2, 3, 5), teacher.reshape(2, 3, 5), soft.reshape(2, 3, 5))
    assert value.item() == pytest.approx(sum(rows) / 6, rel=1e-12)


def test_labels_without_any_preference_are_an_expectation_over_all_classes(triple):
    """Taking off the floor leaves nothing."""
    student, teacher, _ = triple
    expected = sum(dkd(student, teacher, torch.full((6,), k)).item() for k in range(5)) / 5
    assert dkd(student, teacher, torch.full((6, 5), 0.2, dtype=torch.float64)).item() == pytest.approx(
        expected, rel=1e-12
    )


def test_gradient_of_soft_labels(triple):
    student, teacher, first = triple
    soft = mixture(first, first.roll(1), torch.full((6,), 0.7, dtype=torch.float64), smoothing=0.1).requires_grad_()
    student = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dkd(s, teacher, soft.detach()), student)


def test_labels_of_too_many_classes_are_refused():
    logits = torch.randn(2, 20)
    few, many = torch.zeros(2, 20), torch.zeros(2, 20)
    few[:, :8], many[0, :9], many[1, 0] = 1 / 8, 1 / 9, 1.0
    assert dkd(logits, 2 * logits, few) > 0
    with pytest.raises(DistillError, match=r'at most 8.*has 9 classes.*KLDivLoss'):
        dkd(logits, logits, many)


@pytest.mark.parametrize(
    'row, said',
    [
        ([1.0, 1.0, 0.0, 0.0, 0.0], 'a sum of 2 '),
        ([0.0] * 5, 'a sum of 0 '),
        ([1.5, -0.5, 0.0, 0.0, 0.0], 'smallest value of -0.5;'),
        ([math.nan, 1.0, 0.0, 0.0, 0.0], 'a sum of nan'),
    ],
)
def test_soft_labels_that_are_no_shares_are_refused(triple, row, said):
    """Labels of several independent classes, for one."""
    soft = one_hot(triple[2], 5).double()
    soft[3] = torch.tensor(row)
    with pytest.raises(DistillError, match=f'sum to 1.*{said}.*BinaryKLDivLoss'):
        dkd(*triple[:2], soft)
