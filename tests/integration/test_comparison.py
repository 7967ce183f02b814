"""A miniature comparison from data to report, through the same tools as `make demo`."""

import json
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from kd_plugins.lab.comparison.mm.logs import find_metric, read_history
from kd_plugins.lab.data import prepare_digits

ROOT = Path(__file__).parents[2]


@dataclass
class Case:
    """A pair of models, how it is trained in a few steps, and what must come out."""

    teacher: str
    student: str
    term: str
    short: tuple[str, ...]
    columns: tuple[str, ...]
    keys: set[str]
    picture: str
    metric: str
    last: int  # step of the last validation


CASES = {
    'detection': Case(
        teacher='det/digits_yolox_teacher',
        student='det/digits_yolox_student',
        term="dict(loss=dict(type='YOLOLogitLoss'), student='bbox_head', teacher='bbox_head')",
        short=('train_cfg.max_epochs=2', 'train_cfg.val_interval=1'),
        columns=('mAP', 'AP50'),
        keys={'map', 'map50'},
        picture='detections.png',
        metric='bbox_mAP',
        last=2,
    ),
    'segmentation': Case(
        teacher='seg/digits_fpn_teacher',
        student='seg/digits_fpn_student',
        term="dict(loss=dict(type='PixelwiseKLDivLoss'), student='decode_head', teacher='decode_head')",
        short=('train_cfg.max_iters=6', 'train_cfg.val_interval=3', 'default_hooks.checkpoint.interval=3'),
        columns=('mIoU', 'mAcc'),
        keys={'miou', 'macc'},
        picture='segmentations.png',
        metric='mIoU',
        last=6,
    ),
    'classification': Case(
        teacher='cls/digits_resnet_teacher',
        student='cls/digits_deit_student',
        term="dict(loss=dict(type='HardLabelLoss'), student='dist_logits', teacher='logits')",
        short=('train_cfg.max_epochs=2', 'train_dataloader.batch_size=256'),
        columns=('top-1',),
        keys={'top1'},
        picture='classifications.png',
        metric='accuracy/top1',
        last=2,
    ),
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return prepare_digits(tmp_path_factory.mktemp('data') / 'digits', train=24, val=8, size=96, progress=False)


@pytest.fixture(scope='module', params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope='module')
def command(case, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('comparison')
    (folder / 'logit.py').write_text(f'terms = dict(logits={case.term})')
    options = [*case.short, 'default_hooks.logger.interval=1']
    return folder / 'runs', [
        *(sys.executable, str(ROOT / 'tools' / 'compare.py'), '--jobs', '2'),
        *('--teacher', str(ROOT / f'configs/{case.teacher}.py'), '--teacher-cfg-options', *options),
        *('--student', str(ROOT / f'configs/{case.student}.py'), '--cfg-options', *options),
        *('--kd', str(folder / 'logit.py'), '--work-dir', str(folder / 'runs')),
    ]


def call(command, data, monkeypatch):
    monkeypatch.setenv('DIGITS_ROOT', f'{data}/')
    return subprocess.run(command, capture_output=True, text=True, timeout=800)


@pytest.mark.slow
@pytest.mark.long
def test_from_data_to_report(case, command, data, monkeypatch):
    runs, command = command
    done = call(command, data, monkeypatch)
    assert done.returncode == 0, done.stdout + done.stderr

    for cell in ('model', 'parameters', *case.columns, 'gain', 's/iter', 'weights', 'teacher', 'plain', 'logit'):
        assert cell in done.stdout
    assert 'one seed' in done.stdout

    results = json.loads((runs / 'results.json').read_text())['arms']
    assert set(results) == {'teacher', 'plain', 'distilled: logit'}
    assert [r['seed'] for r in results['plain']['runs']] == [0]
    assert set(results['plain']['runs'][0]) == {'seed', *case.keys, 'seconds', 'size', 'weights'}
    assert all(0 <= r[k] <= 1 for arm in results.values() for r in arm['runs'] for k in case.keys)
    assert all(r['seconds'] > 0 for arm in results.values() for r in arm['runs'])
    assert all(Path(r['weights']).is_file() for arm in results.values() for r in arm['runs'])
    assert results['teacher']['parameters'] > results['plain']['parameters']
    # The promise to users: the distilled checkpoint is a plain student's.
    ours = [r for name in ('plain', 'distilled: logit') for r in results[name]['runs']]
    files = [Path(r['weights']).stat().st_size for r in ours]
    assert len({r['size'] for r in ours}) == 1 and max(files) < 1.01 * min(files)
    assert max(r['size'] for r in ours) < 0.8 * min(files), 'weights only: the files hold optimizers too'

    page = (runs / 'report.html').read_text()
    for picture in ('curves.png', case.picture):
        assert picture in page
        with Image.open(runs / picture) as image:
            assert image.width > 500
        assert (runs / picture).stat().st_size < 1_000_000

    for arm in ('plain', 'logit'):
        folder = runs / 'seed0' / arm
        history = read_history(folder / 'train')
        assert ('loss_kd_logits' in history.train[1]) == (arm == 'logit')
        # The checkpoint on disk is the model that was validated last.
        (metrics,) = (folder / 'test').glob('*/*.json')
        tested = find_metric(json.loads(metrics.read_text()), case.metric)
        validated = find_metric(history.val.get(case.last, {}), case.metric)
        assert tested == pytest.approx(validated, nan_ok=True)


@pytest.mark.slow
@pytest.mark.long
def test_second_call_trains_nothing(command, data, monkeypatch):
    runs, command = command
    before = {p: p.stat().st_mtime_ns for p in runs.rglob('*.pth')}
    assert before, 'the first test has run'
    done = call(command, data, monkeypatch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('already done') == 6  # 3 trainings, 3 evaluations
    assert {p: p.stat().st_mtime_ns for p in runs.rglob('*.pth')} == before


def test_refuses_before_anything_runs(tmp_path, monkeypatch):
    config = tmp_path / 'no_coco.py'
    config.write_text(
        f"_base_ = '{ROOT}/configs/det/digits_yolox_student.py'\n"
        "val_evaluator = dict(_delete_=True, type='VOCMetric')\ntest_evaluator = val_evaluator\n"
    )
    tool = [str(ROOT / 'tools' / 'compare.py'), '--work-dir', str(tmp_path / 'runs')]
    teacher = ['--teacher', str(ROOT / 'configs/det/digits_yolox_teacher.py')]
    segmentor = str(ROOT / 'configs/seg/digits_fpn_student.py')
    for options, words in (
        ([*teacher, '--student', str(config), '--kd', 'yolo_logit'], 'CocoMetric'),
        (
            [*teacher, '--student', segmentor, '--kd', 'pixel_kl'],
            'measured by mAP and AP50, --student by mIoU and mAcc',
        ),
        ([*teacher, '--student', str(config), '--kd', 'yolo_logits'], "did you mean 'yolo_logit'"),
        ([*teacher, '--student', 'nowhere.py', '--kd', 'yolo_logit'], 'nowhere.py'),
        ([*teacher, '--student', str(config), '--kd', 'yolo_logit', '--seeds', '0'], '--seeds must be at least 1'),
    ):
        monkeypatch.setattr(sys, 'argv', [*tool, *options])
        with pytest.raises(SystemExit) as ended:  # of a process: the message on stderr, and 1
            runpy.run_path(tool[0], run_name='__main__')
        assert str(ended.value.code).startswith('error: ') and words in ended.value.code
    assert not (tmp_path / 'runs').exists()
