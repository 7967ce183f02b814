"""What a distilled run of Ultralytics leaves, and what becomes of one that is resumed without distillation."""

import json

import pytest
import torch

from tests.integration.yolo_lab import new_model, results, save_teacher, train, write_data, write_small

pytest.importorskip('ultralytics')

from ultralytics import YOLO

from kd_plugins.yolo import DistillCallback
from kd_plugins.yolo.log import DISTILLED


class Stop(Exception):
    """What kills a run."""


def stop_in(epoch):
    """A handler that kills a run in an epoch, counted from 0."""

    def stop(trainer):
        if trainer.epoch == epoch:
            raise Stop

    return stop


def test_a_killed_run_is_resumed_plainly_and_then_distilled(tmp_path, caplog):
    data = write_data(tmp_path / 'data', images=4)
    teacher = save_teacher(tmp_path / 'teacher.pt', write_small(tmp_path / 'wide.yaml', (24, 48, 64)))
    model = new_model(write_small(tmp_path / 'small.yaml'))
    DistillCallback(teacher, cls=1.0).register(model)
    model.add_callback('on_train_epoch_start', stop_in(1))
    caplog.set_level('INFO', logger='ultralytics')
    with pytest.raises(Stop):
        train(model, data, tmp_path, epochs=3)
    run = tmp_path / 'run'
    assert 'train/kd_ratio' in results(run) and not (run / 'kd_summary.json').exists()
    assert 'Knowledge distillation is ON' in (run / 'kd_summary.txt').read_text()
    last = run / 'weights/last.pt'
    caplog.clear()

    plain = YOLO(last)
    plain.add_callback(
        'on_train_epoch_end', lambda trainer: (_ for _ in ()).throw(Stop) if trainer.epoch == 2 else None
    )
    with pytest.raises(Stop):
        plain.train(resume=True)
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == 'WARNING' and 'distilled' in r.getMessage())
    assert 'goes on WITHOUT distillation' in warning and f'yolo-kd train resume model={last}' in warning
    found = results(run)
    assert [len(column) for column in found.values()] == [2] * len(found) and not [k for k in found if 'kd' in k]
    assert (run / DISTILLED).is_file()
    caplog.clear()

    again = YOLO(last)
    DistillCallback(teacher, cls=1.0).register(again)
    again.train(resume=True)
    assert 'WITHOUT' not in caplog.text
    # Only what is logged from here on has these columns.
    assert results(run)['epoch'] == [3.0] and results(run)['train/kd_ratio'][0] > 0
    block = json.loads((run / 'kd_summary.json').read_text())
    assert block['student']['path'].endswith('best.pt') and block['best']['at'] and block['metric'] == 'fitness'
    assert block['kd_ratio']['start'] > 0 and 'resumed' in block['notes'][0]
    assert set(block['student']['commands']) == {'test', 'use', 'export'}
    student = YOLO(block['student']['path'])
    assert student.names[0] == 'red' and torch.isfinite(student.predict(torch.zeros(1, 3, 64, 64))[0].boxes.data).all()
    text = (run / 'kd_summary.txt').read_text()
    assert text.index('Knowledge distillation is ON') < text.index('Knowledge distillation is DONE')
