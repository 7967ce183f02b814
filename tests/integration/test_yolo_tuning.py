"""Real runs of Ultralytics' tuner, whose trainings distil."""

import json

import pytest

from kd_plugins.errors import DistillError
from kd_plugins.yolo import DistillCallback
from kd_plugins.yolo.cli import main
from tests.integration.yolo_lab import save_teacher, write_data, write_small

WORDS = ('epochs=1', 'imgsz=64', 'batch=4', 'workers=0', 'device=cpu', 'plots=False', 'amp=False', 'warmup_epochs=0')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tuning')
    student = write_small(folder / 'small.yaml')
    return student, save_teacher(folder / 'teacher.pt', student), write_data(folder / 'data')


def test_what_cannot_run_stops_before_the_first_iteration(files, tmp_path, monkeypatch):
    """Where each of its trainings fails, the tuner goes on to the last."""
    student, teacher, _ = files
    monkeypatch.chdir(tmp_path)
    other = write_data(tmp_path / 'other', names=('cat', 'dog'))
    from ultralytics import YOLO  # after the lab has said where its settings are

    model = YOLO(student)
    DistillCallback(teacher).register(model)
    plain = model.model
    with pytest.raises(DistillError, match='class'):
        model.tune(data=other, iterations=2, epochs=1, imgsz=64, device='cpu', project=str(tmp_path / 'tuned'))
    assert not (tmp_path / 'tuned').exists() and model.model is plain and plain.yaml['nc'] == 3


@pytest.mark.slow
@pytest.mark.long
def test_every_training_of_the_tuner_distils(files, tmp_path, monkeypatch, caplog):
    student, teacher, data = files
    monkeypatch.chdir(tmp_path)
    words = ('tune', f'model={student}', f'data={data}', 'iterations=2', f'project={tmp_path}', *WORDS)
    assert main([*words, f'kd_teacher={teacher}', 'kd_box=0']) == 0
    assert 'Knowledge distillation was ON in 2 training(s) of this tune()' in caplog.text
    (summary,) = tmp_path.glob('multitrain*/*/kd_summary.json')  # the tuner deletes the others
    assert json.loads(summary.read_text())['kd_ratio']['end'] > 0
    assert (tmp_path / 'tune' / 'best_hyperparameters.yaml').is_file() and f'kd={summary.parent}/kd.yaml' in caplog.text
