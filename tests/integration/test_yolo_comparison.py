"""A miniature comparison in Ultralytics from data to report, through the same tool as `make demo`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip('ultralytics')

from kd_plugins.lab.comparison.yolo.demo import write_student
from kd_plugins.lab.comparison.yolo.logs import read_history
from kd_plugins.lab.comparison.yolo.tasks import TASKS
from kd_plugins.lab.data import prepare_digits
from tests.integration import yolo_lab  # noqa: F401  # throw-away settings for the processes that are started

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
SHORT = ('epochs=2', 'imgsz=64', 'batch=8', 'workers=0', 'plots=False')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('comparison')
    data = prepare_digits(folder / 'digits', train=16, val=8, size=96, progress=False)
    command = [
        *(sys.executable, str(ROOT / 'tools/compare.py'), '--zoo', 'yolo', '--jobs', '2'),
        *('--teacher', 'yolo11n.yaml', '--teacher-options', *SHORT),
        *('--student', write_student(folder / 'narrow.yaml'), '--options', *SHORT),
        *('--data', str(data / 'digits.yaml'), '--kd', 'native', 'default', '--work-dir', str(folder / 'runs')),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / 'runs', command, done.stdout


def test_from_data_to_report(runs):
    folder, _, shown = runs
    for cell in ('mAP', 's/epoch', 'teacher', 'plain', 'native distill_model', 'kd_plugins', 'one seed'):
        assert cell in shown
    results = json.loads((folder / 'results.json').read_text())['arms']
    sizes = {name: arm['runs'][0]['size'] for name, arm in results.items()}
    assert sizes['kd_plugins'] == sizes['plain'] < sizes['teacher']
    files = {a: folder / f'seed0/{a}/train/weights/last.pt' for a in ('plain', 'default')}
    # Ours leaves a plain student's file.
    assert abs(files['default'].stat().st_size / files['plain'].stat().st_size - 1) < 0.01
    assert len({results[n]['parameters'] for n in ('plain', 'kd_plugins', 'native distill_model')}) == 1
    columns = {
        arm: (folder / f'seed0/{arm}/train/results.csv').read_text().splitlines()[0]
        for arm in ('plain', 'native', 'default')
    }
    assert 'kdcls_loss' in columns['default'] and 'dis_loss' in columns['native']
    assert not any(word in columns['plain'] for word in ('kd', 'dis_loss'))
    assert all(
        line['loss_kd'] > 0
        for line in read_history(folder / 'seed0/default/train', TASKS['detect'].keys[0]).train.values()
    )
    page = (folder / 'report.html').read_text()
    for picture in ('curves.png', 'detections.png'):
        assert picture in page
        with Image.open(folder / picture) as image:
            assert image.width > 500


def test_second_call_trains_nothing(runs):
    folder, command, _ = runs
    before = {p: p.stat().st_mtime_ns for p in folder.rglob('*.pt')}
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('already done') == 8  # 4 trainings, 4 evaluations
    assert {p: p.stat().st_mtime_ns for p in folder.rglob('*.pt')} == before
