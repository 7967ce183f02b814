"""dist against numpy's correlation coefficients and the authors' formula."""

import numpy as np
import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import DISTLoss, dist


def random(*shape, seed=0, dtype=torch.float64):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softmax(logits, temperature):
    exponents = np.exp(logits.numpy() / temperature)
    return exponents / exponents.sum(1, keepdims=True)


def distance(student, teacher):
    """Mean over the rows of 1 - r."""
    return np.mean([1 - np.corrcoef(s, t)[0, 1] for s, t in zip(student, teacher, strict=True)])


@pytest.mark.parametrize(
    'beta, gamma, temperature', [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0), (0.0, 1.0, 1.0), (3.0, 0.0, 2.0)]
)
def test_formula(beta, gamma, temperature):
    student, teacher = random(6, 5), random(6, 5, seed=1)
    p_s, p_t = softmax(student, temperature), softmax(teacher, temperature)
    expected = temperature**2 * (beta * distance(p_s, p_t) + gamma * distance(p_s.T, p_t.T))
    assert dist(student, teacher, beta=beta, gamma=gamma, temperature=temperature).item() == pytest.approx(
        expected, rel=1e-6
    )
    assert DISTLoss(beta, gamma, temperature)(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def of_the_authors(student, teacher):
    """Their correlation: a.b / (|a||b| + 1e-8) of centred probabilities; no T^2 at T 1."""
    value = 0.0
    for dim in (1, 0):
        a, b = (z.softmax(1) - z.softmax(1).mean(dim, keepdim=True) for z in (student, teacher))
        value += 1 - ((a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)).mean()
    return value


def test_loss_and_gradient_of_the_authors_code():
    student, teacher = random(32, 100).requires_grad_(), random(32, 100, seed=1)
    ours, theirs = dist(student, teacher), of_the_authors(student, teacher)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-6)


def test_classes_that_hardly_vary_over_the_batch_fade_out():
    """Exactly 0 at equality all the same, where the authors' is 1 for such a class."""
    logits = torch.zeros(4, 3, dtype=torch.float64)
    logits[:, 1] = torch.tensor([-14.0, -14.5, -15.0, -15.5])
    other = logits.flip(0)
    assert of_the_authors(logits, logits) > 0.3 and dist(logits, logits).item() == 0.0
    student = logits.clone().requires_grad_()
    loss = dist(student, other, beta=0.0)
    loss.backward()
    assert 0 < loss < 1e-2 and student.grad.abs().max() < 1e-2


def test_every_leading_dimension_is_a_position():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    flat = dist(student.reshape(-1, 5), teacher.reshape(-1, 5))
    assert torch.equal(dist(student, teacher), flat)


def test_the_inter_class_part_alone_is_a_mean_over_the_images():
    """The intra-class part, which relates images, is not."""
    student, teacher = random(4, 5), random(4, 5, seed=1)
    for gamma, same in ((0.0, True), (1.0, False)):
        whole = dist(student, teacher, gamma=gamma)
        halves = [dist(student[i : i + 2], teacher[i : i + 2], gamma=gamma) for i in (0, 2)]
        assert (whole.item() == pytest.approx(sum(halves).item() / 2, rel=1e-9)) is same


def test_order_of_the_images_and_a_doubled_batch_do_not_matter():
    student, teacher = random(6, 5), random(6, 5, seed=1)
    expected = dist(student, teacher).item()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    assert dist(student[order], teacher[order]).item() == pytest.approx(expected, rel=1e-12)
    assert dist(torch.cat([student] * 2), torch.cat([teacher] * 2)).item() == pytest.approx(expected, rel=1e-6)


def test_the_intra_class_part_compares_images_not_classes():
    """Every class probability scaled per class: columns still correlate perfectly, rows no longer."""
    teacher = torch.tensor([[0.2, 0.1, 0.7], [0.1, 0.2, 0.7], [0.15, 0.12, 0.73]], dtype=torch.float64)
    student = teacher.clone()
    student[:, 0] = 0.4 - teacher[:, 0]
    student[:, 1] = 0.4 - teacher[:, 1]
    student[:, 2] = 1 - student[:, :2].sum(1)
    value = dist(student.log(), teacher.log(), beta=0.0)
    # The first two run against the teacher (1 - r = 2); the rest of 1 does so too.
    assert value.item() == pytest.approx(2.0, rel=1e-5)
    assert dist(student.log(), teacher.log(), gamma=0.0) < 1.0


def test_a_batch_of_one_has_no_intra_class_part_and_no_nan():
    student, teacher = random(1, 5).requires_grad_(), random(1, 5, seed=1)
    value = dist(student, teacher, beta=0.0)
    value.backward()
    assert value.item() == 0.0 and not student.grad.any()
    assert torch.equal(dist(student, teacher), dist(student, teacher, gamma=0.0))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('classes', [3, 7, 1000])
def test_constant_rows_and_columns(dtype, classes):
    """A zero-initialised head: every row and every column is constant and counts 1/2."""
    student = torch.zeros(6, classes, dtype=dtype, requires_grad=True)
    value = dist(student, random(6, classes, dtype=dtype))
    value.backward()
    assert torch.isfinite(student.grad).all() and student.grad.any()
    if classes < 1000:  # with many classes the teacher's own columns are short, and fade
        assert value.item() == pytest.approx(1.0, abs=1e-3)
    both = student.detach().clone().requires_grad_()
    value = dist(both, torch.full_like(student, 3.0).detach())
    value.backward()
    assert value.item() == 0.0 and not both.grad.any()


def test_saturated_logits_are_finite():
    student = (100 * torch.eye(4)[[0, 1, 2, 3, 0]]).half().requires_grad_()
    teacher = (100 * torch.eye(4)[[1, 2, 3, 0, 1]]).half()
    value = dist(student, teacher, temperature=0.1)
    value.backward()
    assert torch.isfinite(value) and value > 0 and torch.isfinite(student.grad).all()


def test_two_classes_are_refused_where_they_teach_nothing():
    """Two values correlate by 1 or -1: a part without a gradient must not be left unsaid."""
    student, teacher = random(6, 2).requires_grad_(), random(6, 2, seed=1)
    with pytest.raises(DistillError, match=r'With 2 classes.*beta=1.0.*KLDivLoss, or write beta=0'):
        dist(student, teacher)
    dist(student, teacher, beta=0.0).backward()
    assert student.grad.abs().max() > 1e-3
    with pytest.raises(DistillError, match='at least 2 classes, got 1'):
        dist(student[:, :1], teacher[:, :1])


def test_both_weights_zero_are_refused():
    with pytest.raises(DistillError, match='both 0'):
        DISTLoss(0, 0)
