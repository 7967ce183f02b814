"""cosine_feature against its formula in plain loops, and against the published forms it unites."""

import math

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import CosineFeatureLoss, cosine_feature


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cosine(first, second):
    product = sum(a * b for a, b in zip(first, second, strict=True))
    return product / math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))


def test_formula():
    student, teacher = 3 * random(2, 3, 4, 5) + 1, random(2, 3, 4, 5, seed=1) - 0.5
    total = 0.0
    for b in range(2):
        for y in range(4):
            for x in range(5):
                total += 1 - cosine(student[b, :, y, x].tolist(), teacher[b, :, y, x].tolist())
    value = cosine_feature(student, teacher)
    assert value.item() == pytest.approx(total / (2 * 4 * 5), rel=1e-12)
    assert torch.equal(CosineFeatureLoss()(student, teacher), value)


def test_formula_with_numbers():
    """Angles of 60 degrees and, opposite, of 180."""
    teacher = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    student = torch.tensor([[[3.0, -1.0], [3 * math.sqrt(3), 0.0]]])
    assert cosine_feature(student, teacher).item() == pytest.approx((0.5 + 2.0) / 2, rel=1e-6)


@pytest.mark.parametrize(('grid', 'weight'), [((14, 14), 31.4), ((7, 7), 7.8)])
def test_it_is_the_spatial_view_of_scalekd(grid, weight):
    """alpha * sum ||n(s) - n(t)||^2 / B is 2 alpha H W times ours, at any resolution and batch size."""
    student, teacher = random(3, 8, *grid), random(3, 8, *grid, seed=1)
    unit = [f / f.norm(dim=1, keepdim=True) for f in (student, teacher)]
    theirs = 0.08 * (unit[0] - unit[1]).square().sum() / 3
    factor = 2 * 0.08 * grid[0] * grid[1]
    assert factor == pytest.approx(weight, abs=0.05)
    assert theirs.item() == pytest.approx(factor * cosine_feature(student, teacher).item(), rel=1e-12)


def test_it_is_torchs_cosine_similarity_where_there_is_a_direction():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    expected = 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=1).mean()
    assert cosine_feature(student, teacher).item() == pytest.approx(expected.item(), rel=1e-12)


def test_lengths_do_not_matter_but_directions_do():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    expected = cosine_feature(student, teacher).item()
    lengths = 10 ** (2 * random(2, 1, 4, 5, seed=2).clamp(-1, 1))
    assert cosine_feature(student * lengths, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert cosine_feature(student, teacher * lengths).item() == pytest.approx(expected, rel=1e-12)
    assert cosine_feature(teacher * lengths, teacher).item() == pytest.approx(0, abs=1e-15)
    assert cosine_feature(-teacher, teacher).item() == pytest.approx(2)
    channels = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64).view(1, 3, 1, 1)
    assert cosine_feature(teacher * channels, teacher) > 0.1


def test_mean_over_positions_and_images_but_not_channels():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    once = cosine_feature(student, teacher).item()
    for dim in (0, 1, 2, 3):
        value = cosine_feature(torch.cat([student] * 2, dim), torch.cat([teacher] * 2, dim))
        assert value.item() == pytest.approx(once, rel=1e-12)
    # Channels in which both are silent have no part in a direction, as they would in a mean.
    silent = torch.zeros(2, 5, 4, 5, dtype=torch.float64)
    padded = (torch.cat([x, silent], 1) for x in (student, teacher))
    assert cosine_feature(*padded).item() == pytest.approx(once, rel=1e-12)


@pytest.mark.parametrize('shape', [(2, 3, 20), (2, 3, 2, 2, 5)])
def test_any_number_of_spatial_dimensions(shape):
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    value = cosine_feature(student.reshape(shape), teacher.reshape(shape))
    assert value.item() == pytest.approx(cosine_feature(student, teacher).item(), rel=1e-12)


def test_vectors_are_one_position():
    student, teacher = random(6, 3), random(6, 3, seed=1)
    expected = cosine_feature(student[:, :, None, None], teacher[:, :, None, None])
    assert cosine_feature(student, teacher).item() == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(DistillError, match=r'\(B, C, ...\), got \(6,\)'):
        cosine_feature(student[:, 0], teacher[:, 0])


def test_a_step_down_the_gradient_turns_towards_the_teacher_and_keeps_the_length():
    student, teacher = random(2, 3, 4, 5).requires_grad_(), random(2, 3, 4, 5, seed=1)
    value = cosine_feature(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert cosine_feature(student - gradient, teacher) < value
    along = (gradient * student).sum(1)
    assert along.abs().max() < 1e-15
    towards = (-gradient * teacher).sum(1)
    assert (towards > 0).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('size', [0.0, 1e-6])
def test_vectors_without_a_direction(dtype, size):
    """Of dead ReLUs or a zero-initialised projection, at a single position too."""
    varied = random(1, 3, 1, 1, dtype=dtype)
    dead = torch.full_like(varied, size)
    for student, teacher, expected, moves in (
        (dead, varied, 0.5, True),
        (varied, dead, 0.5, bool(size)),
        (dead, dead, 0.0, False),
    ):
        student = student.clone().requires_grad_()
        value = cosine_feature(student, teacher)
        value.backward()
        assert value.item() == pytest.approx(expected, abs=0.02)
        assert student.grad.dtype == dtype and torch.isfinite(student.grad).all()
        # Of an unmoved one no more than rounding errors of the unit vector are left.
        assert (student.grad.abs().max() > 1e-6) == moves


def test_zeros_move_towards_the_teacher():
    teacher = random(2, 3, 4, 5)
    student = torch.zeros_like(teacher).requires_grad_()
    cosine_feature(student, teacher).backward()
    assert cosine_feature(-student.grad, teacher) < 1e-12


def test_float16_squares_do_not_overflow():
    teacher = 300 * random(2, 3, 4, 5)
    assert cosine_feature((-teacher).half(), teacher.half()).item() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_under_autocast_it_is_that_of_float32(dtype):
    student, teacher = random(2, 3, 4, 5, dtype=dtype).requires_grad_(), random(2, 3, 4, 5, seed=1, dtype=dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = cosine_feature(student, teacher)
    value.backward()
    assert value.dtype == torch.float32 and student.grad.dtype == dtype
    assert torch.equal(value, cosine_feature(student.float(), teacher.float()))


def test_different_shapes_point_to_the_adapter():
    with pytest.raises(DistillError, match=r"\(1, 2, 3, 3\).*\(1, 4, 3, 3\); .*adapter='auto'"):
        cosine_feature(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3))
