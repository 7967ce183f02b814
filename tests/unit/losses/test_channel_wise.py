"""channel_wise_div against its formula in plain loops."""

import math

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import ChannelWiseDivLoss, channel_wise_div, kl_div


def random(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(values, temperature):
    exponents = [math.exp(v / temperature) for v in values]
    return [e / sum(exponents) for e in exponents]


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_formula(temperature):
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    total = 0.0
    for b in range(2):
        for c in range(3):
            p_s = softmax(student[b, c].flatten().tolist(), temperature)
            p_t = softmax(teacher[b, c].flatten().tolist(), temperature)
            total += sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))
    expected = temperature**2 / 3 * total / 2
    value = channel_wise_div(student, teacher, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(ChannelWiseDivLoss(temperature)(student, teacher), value)


def test_formula_with_numbers():
    """One channel on two positions, teacher (3/4, 1/4), student (1/2, 1/2)."""
    teacher = torch.tensor([math.log(3.0), 0.0]).view(1, 1, 1, 2)
    value = channel_wise_div(torch.zeros(1, 1, 1, 2), teacher, temperature=1.0)
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


def test_it_is_hintons_loss_with_positions_as_classes():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    expected = kl_div(student.reshape(6, 20), teacher.reshape(6, 20), temperature=4.0)
    assert channel_wise_div(student, teacher).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_constant_per_channel_does_not_matter():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    shifted = student + 10 * random(2, 3, 1, 1, seed=2)
    assert channel_wise_div(shifted, teacher).item() == pytest.approx(channel_wise_div(student, teacher).item())
    assert channel_wise_div(student + 10 * random(2, 1, 4, 5, seed=2), teacher) > 2 * channel_wise_div(student, teacher)


def test_mean_over_channels_and_images_but_not_positions():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    once = channel_wise_div(student, teacher, temperature=1.0).item()
    # Every position split into two of half the probability leaves the divergence as it is.
    for dim in range(4):
        twice = channel_wise_div(torch.cat([student] * 2, dim), torch.cat([teacher] * 2, dim), temperature=1.0)
        assert twice.item() == pytest.approx(once, rel=1e-12)
    # Positions without probability add nothing, and are not counted.
    silent = torch.full((2, 3, 4, 5), -30.0, dtype=torch.float64)
    padded = (torch.cat([x, silent], 3) for x in (student, teacher))
    assert channel_wise_div(*padded, temperature=1.0).item() == pytest.approx(once, rel=1e-6)


@pytest.mark.parametrize('shape', [(2, 3, 20), (2, 3, 2, 2, 5)])
def test_any_number_of_spatial_dimensions(shape):
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    value = channel_wise_div(student.reshape(shape), teacher.reshape(shape))
    assert torch.equal(value, channel_wise_div(student, teacher))


def test_large_gap_has_the_exact_value():
    """The logarithm of the student's probability of the teacher's position would be infinite: it is e^-200."""
    student = torch.tensor([200.0, 0.0]).view(1, 1, 1, 2).requires_grad_()
    value = channel_wise_div(student, torch.tensor([0.0, 200.0]).view(1, 1, 1, 2), temperature=1.0)
    value.backward()
    assert value.item() == pytest.approx(200.0)
    torch.testing.assert_close(student.grad.flatten(), torch.tensor([1.0, -1.0]))


def test_vectors_are_refused():
    with pytest.raises(DistillError, match=r'maps, \(B, C, H, W\), got \(2, 3\)'):
        channel_wise_div(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(DistillError, match="adapter='auto'"):
        channel_wise_div(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
