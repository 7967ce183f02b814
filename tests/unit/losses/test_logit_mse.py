"""logit_mse against its formula, computed by hand."""

import pytest

from kd_plugins.losses import LogitMSELoss, logit_mse
from tests.unit.losses.test_kl_div import random


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_formula(temperature):
    student, teacher = random(4, 7), random(4, 7, seed=1)
    squares = [
        (s - t / temperature) ** 2
        for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True)
        for s, t in zip(ours, theirs, strict=True)
    ]
    expected = sum(squares) / len(squares)
    assert logit_mse(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)
    assert LogitMSELoss(temperature)(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_it_is_0_where_the_student_has_what_it_is_shown():
    teacher = random(4, 7)
    assert logit_mse(teacher / 4, teacher, temperature=4.0).item() == 0
    assert logit_mse(teacher, teacher, temperature=4.0) > 1
