"""hard_label against the cross-entropy, computed by hand."""

import math

import pytest
import torch

from kd_plugins.losses import HardLabelLoss, hard_label


def test_formula():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = []
    for s, t in zip(student.reshape(-1, 5).tolist(), teacher.reshape(-1, 5).tolist(), strict=True):
        label = t.index(max(t))
        rows.append(math.log(sum(math.exp(v) for v in s)) - s[label])
    assert hard_label(student, teacher).item() == pytest.approx(sum(rows) / len(rows), rel=1e-12)
    assert HardLabelLoss()(student, teacher).item() == pytest.approx(sum(rows) / len(rows), rel=1e-12)


def test_only_the_decision_of_the_teacher_counts():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    assert torch.equal(hard_label(student, teacher), hard_label(student, 100 * teacher + 3))


def test_zero_for_a_certain_student():
    assert hard_label(torch.tensor([[90.0, 0.0]]), torch.tensor([[0.1, 0.0]])).item() == 0.0
    assert hard_label(torch.zeros(1, 4), torch.eye(4)[:1]).item() == pytest.approx(math.log(4))
