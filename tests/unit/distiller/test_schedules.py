"""Schedules of weights and temperatures."""

import math

import pytest

from kd_plugins.distiller.schedules import Position, build_schedule
from kd_plugins.errors import DistillError


def at(fraction, epochs=10, batches=4):
    """In a run of so many epochs."""
    return Position(fraction * epochs * batches, epochs * batches, int(fraction * epochs), fraction * epochs, epochs)


def values(schedule, *fractions):
    return [schedule(at(f)) for f in fractions]


def test_constant():
    for value in (2, dict(type='constant', value=2)):
        schedule = build_schedule(value, 'weight')
        assert values(schedule, 0, 0.5, 1) == [2.0] * 3 and str(schedule) == '2'


def test_linear_between_its_times():
    options = dict(type='linear', start=1.0, end=3.0)
    times = dict(fraction=(0.25, 0.75), epochs=(2.5, 7.5), iterations=(10, 30))
    for by, (begin, until) in times.items():
        schedule = build_schedule(dict(options, by=by, begin=begin, until=until), 'weight')
        assert values(schedule, 0, 0.25, 0.5, 0.75, 1) == [1, 1, 2, 3, 3]
    assert str(schedule) == '1 -> 3 (linear, 10 to 30 iterations)'
    assert build_schedule(dict(options, begin=0.25, until=0.75), 'weight') == build_schedule(
        dict(options, begin=0.25, until=0.75, by='fraction'), 'weight'
    )


def test_cosine():
    schedule = build_schedule(dict(type='cosine', start=2.0, end=0.0), 'weight')
    for p in (0, 0.1, 0.5, 0.9, 1):
        assert schedule(at(p)) == pytest.approx(1 + math.cos(math.pi * p), abs=1e-12)


def test_reciprocal():
    """Annealing: the factor of the teacher's logits, 1 / T, rises evenly from 1 / 10 to 1."""
    schedule = build_schedule(dict(type='reciprocal', start=10.0, end=1.0, until=0.5), 'temperature', 0.0, strict=True)
    assert [1 / v for v in values(schedule, 0, 0.25, 0.5, 1)] == pytest.approx([0.1, 0.55, 1, 1])
    assert str(schedule) == '10 -> 1 (reciprocal, 0 to 0.5 of the run)'
    with pytest.raises(DistillError, match=r'weight\.end must be above 0, because one over it changes evenly'):
        build_schedule(dict(type='reciprocal', start=1, end=0), 'weight')


def test_exponential():
    """The classic 0.99 per epoch: the same in all of an epoch's iterations."""
    schedule = build_schedule(dict(type='exponential', start=2.0, gamma=0.99), 'weight')
    for p in (0, 0.05, 0.1, 0.55, 1):
        assert schedule(at(p)) == pytest.approx(2.0 * 0.99 ** math.floor(10 * p), abs=1e-12)
    assert str(schedule) == '2, times 0.99 per epoch'
    floor = build_schedule(dict(type='exponential', start=2.0, gamma=0.1, end=0.5), 'temperature', 0.0, strict=True)
    assert values(floor, 0, 0.1, 1) == [2, 0.5, 0.5]
    whole = build_schedule(dict(type='exponential', start=2.0, gamma=0.25, by='fraction'), 'weight')
    assert values(whole, 0, 0.5, 1) == [2, 1, 0.5] and str(whole) == '2, times 0.25 over the run'
    often = build_schedule(dict(type='exponential', start=1.0, gamma=0.5, by='iterations'), 'weight')
    assert values(often, 0, 1 / 40, 2 / 40) == [1, 0.5, 0.25]


def test_step():
    schedule = build_schedule(dict(type='step', start=4.0, gamma=0.5, milestones=[3, 6], by='epochs'), 'weight')
    assert values(schedule, 0, 0.29, 0.3, 0.59, 0.6, 1) == [4, 4, 2, 2, 1, 1]
    assert str(schedule) == '4, times 0.5 at 3, 6 epochs'


def test_piecewise():
    schedule = build_schedule(dict(type='piecewise', points=[[0.2, 0], [0.4, 1], [0.8, 1], [0.8, 3]]), 'weight')
    assert values(schedule, 0, 0.2, 0.3, 0.4, 0.6, 0.8, 1) == pytest.approx([0, 0, 0.5, 1, 1, 3, 3], abs=1e-12)
    assert str(schedule) == '0 at 0.2, 1 at 0.4, 1 at 0.8, 3 at 0.8 of the run'


def test_warm_up_of_another_schedule():
    inner = dict(type='linear', start=4, end=0)
    schedule = build_schedule(dict(type='warmup', value=inner, until=2, by='epochs'), 'weight')
    assert values(schedule, 0, 0.1, 0.2, 0.5, 1) == pytest.approx([0, 1.8, 3.2, 2, 0])
    assert str(schedule) == '4 -> 0 (linear, 0 to 1 of the run), warmed up until 2 epochs'


def test_a_run_without_epochs():
    schedule = build_schedule(dict(type='exponential', start=1, gamma=0.99), 'weight')
    with pytest.raises(DistillError, match="counts iterations, not epochs; write by='iterations'"):
        schedule(Position(3, 10, 3))


def test_the_end_of_a_run():
    assert at(0.3).end.progress == 1 and at(0.3).end.time('epochs') == 10


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
        (dict(type='linear', start=0, end=1, by='epoch'), r"weight\.by must be 'fraction' .*got 'epoch'"),
        (dict(type='linear', start=0, end=1, by='epochs'), "needs 'until', in epochs"),
        (dict(type='constant'), "needs 'value'"),
        (dict(type='exponential', start=1), "'gamma' is missing"),
        (dict(type='exponential', start=1, gamma=0), r'weight\.gamma must be a finite number > 0'),
        (dict(type='exponential', start=1, gamma=1.1), r'weight\.gamma must be in \(0, 1\], got 1.1'),
        (dict(type='step', start=1, gamma=0.1, milestones=[]), 'a list of times'),
        (dict(type='step', start=1, gamma=0.1, milestones=[0.5, 0.5]), 'must ascend'),
        (dict(type='step', start=1, gamma=0.1, milestones=[30]), "a fraction of the run.*write by='epochs'"),
        (dict(type='piecewise', points=[]), 'at least one'),
        (dict(type='piecewise', points=[[0.5, 1], [0, 1]]), 'in the order of their times'),
        (dict(type='piecewise', points=[1, 2]), r'a list of \[time, value\]'),
        (dict(type='piecewise', points=[[0, -1]]), 'points must be a finite number >= 0'),
        (dict(type='warmup', value=1, until=0), 'must be above 0'),
        (dict(type='warmup', value=dict(type='liner'), until=0.1), r"weight\.value has no schedule type 'liner'"),
        (dict(type='linear', start=0, end=1, stop=1), "no option 'stop'"),
        (dict(type='linear', start=-1, end=1), r'weight\.start must be a finite number >= 0'),
        (dict(type='linear', start=0, end=1, begin=0.5, until=0.5), 'begin must come before until'),
        (dict(type='linear', start=0, end=1, until=10), 'a fraction of the run, so at most 1'),
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
    # What decays without a limit, or begins at 0, would be.
    for value in (dict(type='exponential', start=4, gamma=0.5), dict(type='warmup', value=4, until=0.1)):
        with pytest.raises(DistillError, match='> 0, got 0'):
            build_schedule(value, 'temperature', 0.0, strict=True)
