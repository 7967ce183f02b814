"""The mask loss against its formula in plain loops."""

import math

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import MaskKLDivLoss, mask_kl_div


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pixel(s, t, temperature):
    p, q = sigmoid(s / temperature), sigmoid(t / temperature)
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    inside = torch.rand(2, 3, 4, 5, generator=generator) > 0.4
    inside[0, 1] = False
    return student, teacher, inside, torch.rand(2, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize('temperature', [1.0, 2.5])
@pytest.mark.parametrize('scale', [1.0, 5.0])
def test_formula(masks, temperature, scale):
    student, teacher, inside, weight = masks
    weight = weight * scale
    images = []
    for b in range(2):
        total = norm = 0.0
        for k in range(3):
            places = inside[b, k].nonzero().tolist()
            if places:
                values = [pixel(student[b, k, y, x].item(), teacher[b, k, y, x].item(), temperature) for y, x in places]
                total += weight[b, k].item() * sum(values) / len(values)
                norm += weight[b, k].item()
        images.append(total / max(norm, 1.0))
    expected = temperature**2 * sum(images) / 2
    value = mask_kl_div(student, teacher, inside, weight, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-10)
    assert torch.equal(MaskKLDivLoss(temperature)(student, teacher, inside, weight), value)


def test_without_region_and_weight_every_pixel_counts_alike(masks):
    student, teacher, inside, _ = masks
    everywhere = torch.ones_like(inside)
    pixels = [pixel(s, t, 1.0) for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    assert mask_kl_div(student, teacher).item() == pytest.approx(sum(pixels) / len(pixels), rel=1e-10)
    ones = torch.ones(2, 3, dtype=torch.float64)
    torch.testing.assert_close(mask_kl_div(student, teacher, everywhere, ones), mask_kl_div(student, teacher))


def test_outside_neither_value_nor_gradient(masks):
    student, teacher, inside, weight = masks
    expected = mask_kl_div(student, teacher, inside, weight)
    wild = student.masked_fill(~inside, 1e30).requires_grad_()
    value = mask_kl_div(wild, teacher, inside, weight)
    value.backward()
    assert torch.equal(value.detach(), expected)
    assert torch.isfinite(wild.grad).all() and not wild.grad[~inside].any() and wild.grad[inside].all()


def test_no_pixel_inside_any_mask_gives_zero(masks):
    student, teacher, inside, weight = masks
    student = student.requires_grad_()
    value = mask_kl_div(student, teacher, torch.zeros_like(inside), weight)
    value.backward()
    assert value.item() == 0.0 and not student.grad.any()


def test_size_of_an_object_does_not_matter():
    """The same logits on 2 and on 12 pixels."""
    student, teacher = torch.full((1, 1, 4, 4), 1.0), torch.full((1, 1, 4, 4), -1.0)
    values = []
    for rows, columns in ((1, 2), (3, 4)):
        inside = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        inside[:, :, :rows, :columns] = True
        values.append(mask_kl_div(student, teacher, inside))
    torch.testing.assert_close(*values)


def test_wrong_shapes_are_refused(masks):
    student, teacher, inside, weight = masks
    for args, message in (
        ((student, teacher[:, :2]), r'Mask logits.*\(2, 3, 4, 5\).*\(2, 2, 4, 5\)'),
        ((student[0], teacher[0]), r'must be \(B, K, H, W\)'),
        ((student, teacher, inside[:1]), r'inside must be \(2, 3, 4, 5\)'),
        ((student, teacher, inside, weight[:1]), r'weight must be \(2, 3\), got \(1, 3\)'),
        ((student, teacher, None, weight[:1]), r'weight must be \(2, 3\), got \(1, 3\)'),
    ):
        with pytest.raises(DistillError, match=message):
            mask_kl_div(*args)
