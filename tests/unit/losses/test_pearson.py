"""pearson against the correlation of Python's statistics module."""

import statistics

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import PearsonLoss, pearson


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def channel(features, c):
    return [v for image in features[:, c].tolist() for row in image for v in row]


def test_formula():
    student, teacher = 3 * random(2, 3, 4, 5) + 1, random(2, 3, 4, 5, seed=1) - 2
    student[:, 1] += teacher[:, 1] * 5
    correlations = [statistics.correlation(channel(student, c), channel(teacher, c)) for c in range(3)]
    assert correlations[1] > 0.5 > max(correlations[0], correlations[2])
    value = pearson(student, teacher)
    assert value.item() == pytest.approx(sum(1 - r for r in correlations) / 3, rel=1e-8)
    assert torch.equal(PearsonLoss()(student, teacher), value)


def test_relation_to_the_implementation_of_mmrazor():
    """Half the mean squared difference of maps divided by the sample's deviation: (n - 1) / n times ours."""
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    scaled = []
    for features in (student, teacher):
        deviation, mean = torch.std_mean(features, (0, 2, 3), correction=1, keepdim=True)
        scaled.append((features - mean) / deviation)
    theirs = torch.nn.functional.mse_loss(*scaled) / 2
    assert theirs.item() == pytest.approx(39 / 40 * pearson(student, teacher).item(), rel=1e-8)


def test_scale_and_shift_of_a_channel_do_not_matter():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    scale = torch.tensor([0.01, 1.0, 1000.0], dtype=torch.float64).view(1, 3, 1, 1)
    shift = torch.tensor([5.0, -3.0, 100.0], dtype=torch.float64).view(1, 3, 1, 1)
    expected = pearson(student, teacher).item()
    assert pearson(student * scale + shift, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert pearson(student, teacher * scale + shift).item() == pytest.approx(expected, rel=1e-5)
    assert pearson(teacher * scale + shift, teacher).item() == pytest.approx(0, abs=1e-9)
    assert pearson(-teacher, teacher).item() == pytest.approx(2)


def test_every_channel_counts_alike():
    """One with features a thousand times larger too."""
    teacher = random(2, 2, 4, 5)
    for c, scale in ((0, 1000.0), (1, 1.0)):
        student = teacher.clone()
        student[:, c] *= -scale
        assert pearson(student, teacher).item() == pytest.approx(1.0)


def test_statistics_are_of_the_whole_batch():
    """A channel that differs between the images only, not within them, correlates."""
    images = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert pearson(2 * images, images).item() == pytest.approx(0, abs=1e-9)
    assert pearson(-images, images).item() == pytest.approx(2)


def test_a_doubled_batch_has_the_same_loss():
    student, teacher = random(3, 3, 4, 5), random(3, 3, 4, 5, seed=1)
    expected = pearson(student, teacher).item()
    for dim in (0, 1, 2, 3):
        value = pearson(torch.cat([student] * 2, dim), torch.cat([teacher] * 2, dim))
        assert value.item() == pytest.approx(expected, rel=1e-12)
    order = torch.tensor([2, 0, 1])
    assert pearson(student[order], teacher[order]).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('value', [0.0, 0.1, 777.7])
def test_constant_channels(dtype, value):
    """A zero-initialised projection, a dead channel of the teacher; the mean of 777.7 is off by a rounding error."""
    varied = random(3, 2, 11, 13, dtype=dtype)
    constant = torch.full_like(varied, value)
    for student, teacher, expected in ((constant, varied, 0.5), (varied, constant, 0.5), (constant, 2 * constant, 0.0)):
        student = student.clone().requires_grad_()
        loss = pearson(student, teacher)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-3)
        assert torch.isfinite(student.grad).all()
    equal = constant.clone().requires_grad_()
    loss = pearson(equal, constant)
    loss.backward()
    assert loss.item() == 0.0 and not equal.grad.any()


def test_a_constant_student_moves_towards_the_teacher():
    teacher = random(2, 3, 4, 5)
    student = torch.zeros_like(teacher).requires_grad_()
    pearson(student, teacher).backward()
    step = -student.grad / student.grad.abs().max()
    assert pearson(step, teacher) < 1e-6


def test_float16_squares_do_not_overflow():
    teacher = 300 * random(2, 3, 4, 5)
    student = (-teacher).half()
    assert pearson(student, teacher.half()).item() == pytest.approx(2.0, rel=1e-6)


def test_a_single_value_per_channel_gives_zero_with_a_gradient_path():
    student = random(1, 3, 1, 1).requires_grad_()
    value = pearson(student, random(1, 3, 1, 1, seed=1))
    value.backward()
    assert value.item() == 0.0 and not student.grad.any()


def test_embeddings_and_what_is_not():
    student, teacher = random(6, 3), random(6, 3, seed=1)
    expected = pearson(student[:, :, None, None], teacher[:, :, None, None])
    assert torch.equal(pearson(student, teacher), expected)
    with pytest.raises(DistillError, match=r'\(B, C, ...\), got \(6,\)'):
        pearson(student[:, 0], teacher[:, 0])
