"""What a run says in its end, the summary of its start within 100 columns, and the advice on proportions."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_plugins.distiller import Position, Session, build_terms, ending, stopwatch, summary
from kd_plugins.distiller.balance import Balance
from kd_plugins.distiller.stages import build_stages
from kd_plugins.distiller.stopwatch import MEASURED, SKIPPED, Stopwatch
from kd_plugins.distiller.summary import WIDTH, Row
from kd_plugins.teachers import FrozenTeacher
from kd_plugins.teachers.run import check_alpha


def one_end(folder, **changes):
    options = dict(
        name='YOLOX',
        unit='epoch',
        total=12,
        seconds=3725.0,
        share=(0.62, 0.35),
        best=ending.Best({'coco/bbox_mAP': 0.4123, 'coco/bbox_mAP_s': math.nan}, 9),
        teacher=0.5,
        student=ending.Student('w/kd_student.pth', 'last checkpoint, epoch 12', 'weights', {'test': 'kd-plugins test'}),
        notes=('a ' * 80,),
        folder=str(folder),
    )
    return ending.Ending(**{**options, **changes})


def strictly(text):
    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    return json.loads(text, parse_constant=refuse)


def test_the_block_says_what_came_out(tmp_path):
    lines = one_end(tmp_path).text().splitlines()
    assert lines[0] == 'Knowledge distillation is DONE'
    assert lines[1].split()[:2] == ['best', 'coco/bbox_mAP'] and '0.4123 at epoch 9 of 12' in lines[1]
    for words in ('teacher  0.5', 'kd_ratio 0.62 at the start, 0.35 at the end', '1 h 02 min', 'w/kd_student.pth'):
        assert any(words in line for line in lines), words
    assert '  test     kd-plugins test' in lines
    assert max(map(len, lines)) <= WIDTH


def test_a_run_that_measured_nothing_says_so(tmp_path):
    text = one_end(tmp_path, best=None, teacher=None, student=None, share=(None, None), notes=('why',)).text()
    assert 'not validated' in text and 'KD was never on' in text and 'note     why' in text
    assert 'teacher' not in text and '  student' not in text


def test_the_files_beside_the_log(tmp_path):
    ending.write_text(tmp_path, 'of an earlier run')
    ending.write_text(tmp_path, 'ON')
    end = one_end(tmp_path, share=(math.nan, math.inf))
    end.write()
    text = (tmp_path / ending.TEXT_FILE).read_text()
    assert text == f'ON\n\n\n{end.text()}\n'
    data = strictly((tmp_path / ending.JSON_FILE).read_text())
    assert data['best'] == {'at': 9, 'metrics': {'coco/bbox_mAP': 0.4123, 'coco/bbox_mAP_s': None}}
    assert data['metric'] == 'coco/bbox_mAP' and data['kd_ratio'] == {'start': None, 'end': None}
    assert data['student']['commands'] == {'test': 'kd-plugins test'}


@pytest.mark.parametrize('greater, at', [(True, 2), (False, 1), (None, 3)])
def test_the_best_validation_is_kept(greater, at):
    kept = ending.Validations(greater)
    for epoch, value in enumerate((0.1, 0.3, 0.2), 1):
        kept.add({'other': 1.0, 'path': 'x', 'mAP': torch.tensor(value)}, 'mAP', epoch)
    kept.add({'mAP': math.nan}, 'mAP', 4)
    assert kept.best.at == at and list(kept.best.metrics) == ['mAP', 'other']


# ---------------------------------------------------------------------- KD over task loss
def balance_of(ratios, task=2.0):
    balance = Balance()
    for ratio in ratios:
        balance.add(torch.tensor(task), torch.tensor(task * ratio))
    return balance


@pytest.mark.parametrize(
    'ratios, share',
    [
        ([], (None, None)),
        ([0.5], (0.5, 0.5)),
        ([0.4, 0.2], (0.4, 0.2)),
        ([0.8] * 100 + [9.0] * 500 + [0.1] * 100, (0.8, 0.1)),
        ([math.inf, 0.2], (None, 0.2)),
    ],
    ids=str,
)
def test_share_at_start_and_end(ratios, share):
    balance = balance_of(ratios)
    assert balance.share() == pytest.approx(share)
    balance.ratio()
    assert balance.share() == pytest.approx(share), 'asking for the ratio of an epoch forgot the run'


@pytest.mark.parametrize(
    'alpha, stages, share',
    [
        (None, None, (0.5, 0.5)),
        (0.75, None, (2.0, 2.0)),
        (1, None, (None, None)),
        (0.75, [dict(until=0.5, freeze=['0']), {}], (2.0, 2.0)),
        (0.75, [dict(until=0.5, alpha=1), {}], (None, None)),
    ],
    ids=str,
)
def test_share_is_what_was_logged(alpha, stages, share):
    session = session_of(dict(term=1.0), alpha=alpha, stages=build_stages(stages, check_alpha))
    session.balance = balance_of([0.5])
    assert session.share == pytest.approx(share)


def test_a_run_without_labels_is_not_said_to_be_undistilled(tmp_path):
    text = one_end(tmp_path, share=(None, None), asked=7).text()
    assert 'KD was on in 7 iterations' in text and 'never' not in text


def test_what_teachers_take_is_said(tmp_path):
    end = one_end(tmp_path, teachers={'': 0.0123})
    assert '(per batch: the teacher 12.3 ms)' in end.text()
    assert (
        one_end(tmp_path, teachers=dict(big=1.5, small=0.1)).text().count('(per batch: big 1.5e+03 ms, small 100 ms)')
    )
    assert end.to_dict()['teacher_seconds_per_batch'] == {'': 0.0123}


def test_the_stopwatch_leaves_out_the_first_batches_and_stops():
    """Which batches it looks at, not how long they take."""
    watch, asked = Stopwatch(), []

    class Clock:
        @staticmethod
        def perf_counter():
            asked.append(len(asked))
            return float(len(asked))

    stopwatch.time, before = Clock, stopwatch.time
    try:
        for _ in range(SKIPPED):
            with watch.measure('big', 'cpu'):
                pass
        assert watch.medians() == {} and not asked
        for _ in range(3 * MEASURED):
            with watch.measure('big', 'cpu'):
                pass
    finally:
        stopwatch.time = before
    assert len(asked) == 2 * MEASURED and watch.medians() == dict(big=1.0)


def session_of(weights, **options):
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 1)) for _ in range(2))
    term = dict(loss=dict(type='FeatureMSELoss'), student='0', teacher='0')
    terms = build_terms({name: {**term, 'weight': weight} for name, weight in weights.items()})
    held = FrozenTeacher(teacher, lambda *given: None, lambda inputs, samples: inputs, name='net')
    session = Session(student, held, terms, **options)
    session.begin_iteration(Position(0, 10, 0))
    return session


def said(session, ratio):
    session.balance.add(torch.tensor(1.0), torch.tensor(ratio))
    return session.proportion()


RAMP = dict(type='linear', start=2.0, end=0.0)


@pytest.mark.parametrize(
    'weights, ratio, words',
    [
        ({'a': 0.2}, 0.004, 'it hardly changes the student; raise the weights: weight=25 would give 0.5'),
        ({'a': 3.0}, 50.0, 'the labels hardly count; lower the weights: weight=0.03 would give 0.5'),
        ({'a': 1.0, 'b': 2.0}, 0.005, 'raise the weights: a: weight=100, b: weight=200 would give 0.5'),
        ({'a': RAMP}, 0.005, 'raise the weights: 100 times what they are would give 0.5'),
        ({'a': 1.0}, 0.0, 'raise the weights'),
    ],
    ids=str,
)
def test_the_number_to_write(weights, ratio, words):
    session = session_of(weights)
    assert said(session, ratio).endswith(words)
    assert said(session, ratio) is None, 'said twice'


@pytest.mark.parametrize(
    'weights, ratio, options',
    [
        ({'a': 1.0}, 0.5, {}),
        ({'a': 1.0}, 500.0, dict(alpha=1.0)),
        ({'a': dict(type='linear', start=0.001, end=1.0)}, 0.001, {}),
    ],
    ids=('in proportion', 'nothing but KD is asked for', 'on its way up'),
)
def test_what_was_asked_for_is_no_warning(weights, ratio, options):
    assert said(session_of(weights, **options), ratio) is None


# ---------------------------------------------------------------------- the summary of the start
def summary_text(**changes):
    row = dict(
        name='logits',
        loss='LocalizationDistillLoss',
        student='head',
        student_shape='189 positions, strides 8/16/32, 80 classes+obj+box, and what else a head returns',
        teacher='big:a_long.path.through_a.model.to_its.bbox_head[3]',
        teacher_shape='189 positions',
        adapter='1x1 convolutions of 64 to 128 channels',
        parameters=10,
        weight='linear from 1 to 0',
        when='from epoch 3 up to epoch 5',
    )
    teacher = SimpleNamespace(
        parameters_count=5, dtype=torch.float32, mode='frozen', name='t', checkpoint='/x' * 70, normalization='a ' * 70
    )
    return summary(
        [Row(**{**row, **changes})],
        {'': teacher},
        student='S',
        student_parameters=3,
        classes={'': 'the same'},
        schedule='always',
        notes=['word ' * 40],
    )


def test_no_line_is_longer_than_a_terminal():
    lines = summary_text().splitlines()
    # But for a path, which is to be copied.
    assert [line for line in lines if len(line) > WIDTH] == ['  weights  ' + '/x' * 70]
    text = summary_text()
    for word in ('positions,', '8/16/32,', 'LocalizationDistill', 'convolutions', 'channels'):
        assert word in text, f'{word} was broken'


def test_a_table_with_room_is_left_alone():
    short = dict(student_shape='4x4', teacher='head', teacher_shape='4x4', adapter='none', weight='1', when='')
    row = next(line for line in summary_text(**short).splitlines() if 'LocalizationDistillLoss' in line)
    assert row.split() == ['logits', 'LocalizationDistillLoss', '1', 'student', 'head', '4x4', 'none']
