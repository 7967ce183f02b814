"""binary_kl_div against its formula in plain loops."""

import math

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import BinaryKLDivLoss, binary_kl_div


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def per_position(student, teacher, temperature=1.0):
    """(B, A) lists: sum over classes of BCE(student, p) - H(p)."""

    def one(s, t):
        q, p = sigmoid(s / temperature), sigmoid(t / temperature)
        bce = -p * math.log(q) - (1 - p) * math.log(1 - q)
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        return bce - entropy

    return [
        [
            sum(one(s, t) for s, t in zip(row_s, row_t, strict=True))
            for row_s, row_t in zip(image_s, image_t, strict=True)
        ]
        for image_s, image_t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]


def mean(loss):
    values = [v for image in loss for v in image]
    return sum(values) / len(values)


def random(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_formula(temperature):
    student, teacher = random(2, 5, 3), random(2, 5, 3, seed=1)
    expected = temperature**2 * mean(per_position(student, teacher, temperature))
    assert binary_kl_div(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)
    assert BinaryKLDivLoss(temperature)(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_formula_with_numbers():
    """Teacher 3/4, student 1/2, two classes at one position: twice 3/4 ln 3/2 + 1/4 ln 1/2."""
    value = binary_kl_div(torch.zeros(1, 1, 2), torch.full((1, 1, 2), math.log(3.0)))
    assert value.item() == pytest.approx(2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-6)


def test_foreground_weights_by_the_highest_class_probability(weighted_mean):
    student, teacher = random(2, 5, 3), random(2, 5, 3, seed=1)
    teacher[0] -= 6  # less than one position's worth of confidence: the sum is clamped
    weight = [[max(sigmoid(v) for v in row) for row in image] for image in teacher.tolist()]
    assert sum(weight[0]) < 1 < sum(weight[1])
    for temperature in (1.0, 2.0):
        expected = temperature**2 * weighted_mean(per_position(student, teacher, temperature), weight)
        value = BinaryKLDivLoss(temperature, foreground=True)(student, teacher)
        assert value.item() == pytest.approx(expected, rel=1e-12)


def test_weight_given_by_the_caller(weighted_mean):
    student, teacher, weight = random(2, 5, 3), random(2, 5, 3, seed=1), random(2, 5, seed=2).abs()
    expected = weighted_mean(per_position(student, teacher), weight.tolist())
    assert binary_kl_div(student, teacher, weight).item() == pytest.approx(expected, rel=1e-12)
    assert BinaryKLDivLoss(foreground=True)(student, teacher, weight).item() == pytest.approx(expected, rel=1e-12)
    assert BinaryKLDivLoss()(student, teacher, weight) == binary_kl_div(student, teacher)


def test_uniform_weight_is_the_plain_mean():
    student, teacher = random(2, 5, 3), random(2, 5, 3, seed=1)
    weighted = binary_kl_div(student, teacher, torch.full((2, 5), 0.7))
    assert weighted.item() == pytest.approx(binary_kl_div(student, teacher).item(), rel=1e-12)


def test_weight_of_zero_everywhere_is_zero():
    student = random(2, 5, 3).requires_grad_()
    value = binary_kl_div(student, random(2, 5, 3, seed=1), torch.zeros(2, 5))
    value.backward()
    assert value == 0 and torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize('shape', [(2, 5, 1), (2, 1), (5,)])
def test_weight_of_another_shape_is_refused(shape):
    with pytest.raises(DistillError, match=r'weight must have one value per position, \(2, 5\)'):
        binary_kl_div(random(2, 5, 3), random(2, 5, 3), torch.ones(shape))


def test_sum_over_classes_and_mean_over_positions():
    student, teacher = random(2, 5, 3), random(2, 5, 3, seed=1)
    once = binary_kl_div(student, teacher).item()
    assert binary_kl_div(*(torch.cat([x, x], -1) for x in (student, teacher))).item() == pytest.approx(2 * once)
    assert binary_kl_div(*(torch.cat([x, x], 1) for x in (student, teacher))).item() == pytest.approx(once)


def test_multi_label_classification():
    """(N, C): every row is an image of one position."""
    student, teacher = random(6, 3), random(6, 3, seed=1)
    expected = binary_kl_div(student[:, None], teacher[:, None])
    assert binary_kl_div(student, teacher).item() == pytest.approx(expected.item(), rel=1e-12)
    value = BinaryKLDivLoss(foreground=True)(student, teacher)
    assert value == BinaryKLDivLoss(foreground=True)(student[:, None], teacher[:, None])


def test_gradient_is_t_times_the_difference_of_probabilities():
    student, teacher = random(2, 5, 3).requires_grad_(), random(2, 5, 3, seed=1)
    binary_kl_div(student, teacher, temperature=3.0).backward()
    expected = 3.0 * ((student / 3).sigmoid() - (teacher / 3).sigmoid()) / 10
    torch.testing.assert_close(student.grad, expected.detach())


def test_large_logit_gap_has_the_exact_value():
    value = binary_kl_div(torch.full((1, 1, 1), 200.0), torch.full((1, 1, 1), -200.0))
    assert value.item() == pytest.approx(200.0)


def test_from_predictions_weights_by_confidence_with_objectness(predictions, weighted_mean):
    student, teacher = predictions(seed=0), predictions(seed=1)
    weight = teacher.cls.sigmoid().amax(-1) * teacher.obj[..., 0].sigmoid()
    expected = weighted_mean(per_position(student.cls, teacher.cls), weight.tolist())
    value = BinaryKLDivLoss(foreground=True).from_predictions(student, teacher)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert BinaryKLDivLoss().from_predictions(student, teacher) == binary_kl_div(student.cls, teacher.cls)


@pytest.mark.parametrize('activations', [('softmax', 'sigmoid'), ('sigmoid', 'softmax'), ('softmax', 'probability')])
def test_from_predictions_compares_probabilities_across_activations(predictions, activations):
    """Heads that express the same probabilities in another way agree; the background is left out."""

    def head(activation, probability):
        if activation == 'softmax':
            background = 1 - probability.sum(-1, keepdim=True)
            return predictions(cls=torch.cat([probability, background], -1).log() + 7, activation='softmax')
        cls = probability.logit() if activation == 'sigmoid' else probability
        return predictions(cls=cls, activation=activation)

    first, second = (random(2, 8, 4, seed=i).softmax(-1)[..., :-1] for i in (0, 1))
    student, teacher = (head(a, first) for a in activations)
    assert BinaryKLDivLoss().from_predictions(student, teacher).item() == pytest.approx(0, abs=1e-10)
    teacher = head(activations[1], second)
    expected = mean(per_position(first.logit(), second.logit()))
    assert BinaryKLDivLoss().from_predictions(student, teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_from_predictions_in_half_precision(predictions, dtype):
    certain = torch.tensor([0.0, 1.0, 1.0], dtype=dtype).expand(2, 8, 3)
    student = predictions(dtype=dtype, requires_grad=True)
    teacher = predictions(seed=1, dtype=dtype, cls=certain, activation='probability')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = BinaryKLDivLoss(foreground=True).from_predictions(student, teacher)
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(value) and torch.isfinite(student.cls.grad).all()
