"""feature_mse against its formula in plain loops."""

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import FeatureMSELoss, feature_mse


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_formula():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    total = sum((s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    assert feature_mse(student, teacher).item() == pytest.approx(total / (2 * 3 * 4 * 5), rel=1e-12)
    assert FeatureMSELoss()(student, teacher) == feature_mse(student, teacher)


def test_mean_over_channels_and_positions():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    once = feature_mse(student, teacher).item()
    for dim in (0, 1, 2, 3):
        assert feature_mse(torch.cat([student] * 2, dim), torch.cat([teacher] * 2, dim)).item() == pytest.approx(once)


def test_half_precision_does_not_overflow():
    """300^2 is infinite in float16."""
    student = torch.full((1, 2, 3, 3), 300.0, dtype=torch.float16)
    assert feature_mse(student, torch.zeros_like(student)).item() == pytest.approx(90000.0)


def test_different_shapes_point_to_the_adapter():
    with pytest.raises(DistillError, match=r"\(1, 2, 3, 3\).*\(1, 4, 3, 3\); .*adapter='auto'"):
        feature_mse(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3))
