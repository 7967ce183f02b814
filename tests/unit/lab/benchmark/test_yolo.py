"""The benchmark runs on a tiny pair and reports what it measured; how fast is not tested here."""

import json

import pytest

pytest.importorskip('ultralytics')

from kd_plugins.errors import DistillError
from kd_plugins.lab.benchmark import main
from kd_plugins.lab.benchmark.yolo import YOLOPair
from kd_plugins.lab.comparison.yolo.demo import write_student

SMALL = ['--image-size', '64', '--batch-size', '2', '--repeats', '2', '--device', 'cpu']


def test_measures_a_pair(tmp_path, capsys):
    student = write_student(tmp_path / 'narrow.yaml')
    file = tmp_path / 'figures.json'
    (result,) = main(
        ['--zoo', 'yolo', '--student', student, '--teacher', 'yolo11n.yaml', *SMALL, '--no-memory', '--json', str(file)]
    )
    assert all(len(result['seconds'][name]['all']) == 2 for name in ('plain', 'teacher', 'native', 'distilled'))
    operators, waiting = result['operators'], result['waiting']
    assert operators['plain'] + operators['teacher'] < operators['distilled']
    assert operators['distilled'] != operators['native'] > operators['plain'], 'every variant is what it says'
    assert waiting['teacher'] == 0
    assert waiting['distilled'] == waiting['plain'], 'distillation makes the host wait for the GPU'
    assert result['startup']['attaching_processor']['median'] > 0.0, 'the teacher is loaded where the callback starts'
    shown = capsys.readouterr().out
    assert YOLOPair.table(result) in shown
    assert 'aim <= 1.05' in shown and 'aim <= 0.90' in shown
    assert json.loads(file.read_text())['pairs'][0]['native_ratio'] == result['native_ratio']


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--pair', 'yolo12'], "did you mean 'yolo"),
        (['--student', 'yolo11n.yaml'], 'go together'),
        (['--student', 'a.yaml', '--teacher', 'b.yaml', '--pair', 'yolo11'], '--pair names a ready pair'),
        ([*SMALL, '--repeats', '0'], 'repeats must be at least 1'),
        ([*SMALL, '--image-size', '100'], 'multiple of 32'),
        ([*SMALL, '--amp'], '--amp needs --device cuda'),
    ],
)
def test_refuses(arguments, words):
    with pytest.raises(DistillError, match=words):
        main(['--zoo', 'yolo', *arguments])
