"""The table says what was measured: paired gains, spread, losses as losses."""

import math

import pytest
import torch

from kd_plugins.lab.comparison.table import (
    BOXES,
    LABEL_MAPS,
    Arm,
    Result,
    header,
    interval,
    joint_verdicts,
    mean_and_spread,
    render,
    rows,
    seed_rows,
    text,
    verdict,
    weights_size,
)


def arm(name, *maps, seconds=0.1):
    return Arm(name, 560_000, [Result(i, (m, m + 0.2), seconds, 9_700_000) for i, m in enumerate(maps)])


TEACHER = Arm('teacher', 2_240_000, [Result(0, (0.413, 0.689), math.nan, 36_600_000)])


def test_one_seed():
    plain, distilled = arm('plain', 0.2), arm('distilled: a', 0.25, seconds=0.15)
    table = rows(TEACHER, plain, [distilled])
    assert table[0] == ('teacher', '2.24 M', '41.3', '68.9', '', '', '36.6 MB')
    assert table[1] == ('plain', '0.56 M', '20.0', '40.0', '', '0.100', '9.7 MB')
    assert table[2] == ('distilled: a', '0.56 M', '25.0', '45.0', '+5.0', '0.150', '9.7 MB')


def test_gains_are_paired_by_seed_and_negative_ones_are_shown():
    plain, distilled = arm('plain', 0.20, 0.30, 0.40), arm('distilled: a', 0.19, 0.28, 0.41)
    assert distilled.gains(plain) == pytest.approx([-0.01, -0.02, 0.01])
    table = rows(TEACHER, plain, [distilled])
    assert table[1][2] == '30.0 ± 10.0'
    assert table[2][4] == '-0.7 ± 1.5'
    header, cells = seed_rows(plain, [distilled])
    assert header == ('seed', 'plain', 'distilled: a')
    assert cells[1] == ('1', '30.0', '28.0 (-2.0)')
    assert 'better than plain in 1 of 3' in verdict(plain, distilled, 'mAP')
    assert verdict(plain, distilled, 'mAP').startswith('distilled: a: -0.7 ± 1.5 mAP')
    assert '(95 % interval of the mean -4.5 to +3.1)' in verdict(plain, distilled, 'mAP')


def test_columns_are_those_of_the_task():
    assert header(BOXES) == ('model', 'parameters', 'mAP', 'AP50', 'gain', 's/iter', 'weights')
    assert header(LABEL_MAPS, 'epoch') == ('model', 'parameters', 'mIoU', 'mAcc', 'gain', 's/epoch', 'weights')
    printed = text(TEACHER, arm('plain', 0.20, 0.30), [arm('distilled: a', 0.25, 0.31)], LABEL_MAPS)
    assert 'mIoU per seed' in printed and '+3.0 ± 2.8 mIoU over 2 seeds' in printed and 'mAP' not in printed


def test_verdict_of_one_seed_admits_it():
    assert 'one seed' in verdict(arm('plain', 0.2), arm('distilled: a', 0.1), 'mAP')


def test_spread_of_one_value_is_unknown():
    mean, spread = mean_and_spread([0.5])
    assert mean == 0.5 and math.isnan(spread)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))


def test_columns_are_aligned():
    lines = render([('a', '1'), ('long name', '22')], ('model', 'mAP')).splitlines()
    assert lines == ['model      mAP', '--------------', 'a            1', 'long name   22']


def test_a_teacher_that_is_not_better_is_said_so():
    plain, distilled = arm('plain', 0.2, 0.6), arm('distilled: a', 0.25, 0.6)
    assert 'not better' not in text(TEACHER, plain, [distilled], BOXES)
    weak = Arm('teacher', 2_240_000, [Result(0, (0.4, 0.689), math.nan, 36_600_000)])
    assert 'The teacher (40.0 mAP) is not better than the plain student (40.0)' in text(weak, plain, [distilled], BOXES)
    (first, _) = joint_verdicts({'digits': (BOXES, weak, plain, [distilled])})
    assert first.startswith('digits, The teacher')


def test_what_was_not_measured_is_no_number():
    plain, distilled = arm('plain', 0.2), arm('distilled: a', 0.25)
    unknown = Arm('teacher', 2_240_000, [Result(0, (math.nan, math.nan), math.nan, 36_600_000)])
    printed = text(unknown, plain, [distilled], BOXES)
    assert 'nan' not in printed and printed.count('not measured') == 2
    assert 'The teacher has no mAP: whether it is better than the plain student is not known.' in printed
    printed = text(TEACHER, arm('plain', math.nan), [distilled], BOXES)
    assert 'nan' not in printed and 'distilled: a: no gain can be told, as mAP was not measured' in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_the_size_is_that_of_weights_in_single_precision():
    state = {'a': torch.zeros(10, dtype=torch.float16), 'b': torch.zeros(3), 'n': torch.tensor(1), 'meta': 'x' * 99}
    assert weights_size(state) == 4 * 13 + 8


def test_the_files_of_the_models_are_named():
    plain, distilled = (
        Arm(name, 1, [Result(0, (0.2, 0.3), 0.1, 1, f'work/{name}/epoch_1.pth')]) for name in ('plain', 'a')
    )
    lines = text(TEACHER, plain, [distilled], BOXES).splitlines()
    assert lines[-2:] == ['plain  work/plain/epoch_1.pth', 'a      work/a/epoch_1.pth']


def test_interval_is_that_of_the_paired_t_test():
    """Against scipy's own test: the interval holds 0 exactly where the p-value is above 0.05."""
    from scipy.stats import ttest_rel

    plain, better = [0.31, 0.28, 0.35, 0.30], [0.35, 0.30, 0.36, 0.34]
    expected = ttest_rel(better, plain).confidence_interval(0.95)
    found = interval([b - p for b, p in zip(better, plain, strict=True)])
    assert found == pytest.approx((expected.low, expected.high)) and found[0] > 0
    assert interval([0.1, 0.1]) == pytest.approx((0.1, 0.1))
    assert all(map(math.isnan, interval([0.1]))) and all(map(math.isnan, interval([0.1, math.nan])))
