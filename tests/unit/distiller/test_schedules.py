"""Schedules of weights and temperatures."""

import math

import pytest

from kd_plugins.distiller.schedules import build_schedule
from kd_plugins.errors import DistillError


def test_constant():
    schedule = build_schedule(2, 'weight')
    assert [schedule(p) for p in (0, 0.5, 1)] == [2.0] * 3
    assert str(schedule) == '2'


def test_linear_between_its_fractions():
    schedule = build_schedule(dict(type='linear', start=1.0, end=3.0, begin=0.25, until=0.75), 'weight')
    assert [schedule(p) for p in (0, 0.25, 0.5, 0.75, 1)] == [1, 1, 2, 3, 3]


def test_cosine():
    schedule = build_schedule(dict(type='cosine', start=2.0, end=0.0), 'weight')
    for p in (0, 0.1, 0.5, 0.9, 1):
        assert schedule(p) == pytest.approx(1 + math.cos(math.pi * p), abs=1e-12)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        (-1, '>= 0'),
        (math.nan, 'finite'),
        (math.inf, 'finite'),
        (True, 'a number or a schedule'),
        ('1', 'a number or a schedule'),
        (None, 'a number or a schedule'),
        (dict(start=0, end=1), 'no schedule type None'),
        (dict(type='liner', start=0, end=1), "did you mean 'linear'"),
        (dict(type='linear', start=0), "'end' is missing"),
        (dict(type='linear', start=0, end=1, stop=1), "no option 'stop'"),
        (dict(type='linear', start=-1, end=1), r'weight\.start must be a finite number >= 0'),
        (dict(type='linear', start=0, end=1, begin=0.5, until=0.5), 'begin < until'),
        (dict(type='linear', start=0, end=1, until=10), 'fractions of the run'),
    ],
)
def test_refusals(value, message):
    with pytest.raises(DistillError, match=message):
        build_schedule(value, 'weight')


def test_a_temperature_must_be_above_zero():
    with pytest.raises(DistillError, match='> 0'):
        build_schedule(0, 'temperature', 0.0, strict=True)
    with pytest.raises(DistillError, match='> 0'):
        build_schedule(dict(type='linear', start=4, end=0), 'temperature', 0.0, strict=True)
