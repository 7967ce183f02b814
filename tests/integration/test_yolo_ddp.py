"""Two processes started by Ultralytics' own generated worker script."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from kd_plugins.yolo import DistillCallback
from tests.integration.yolo_lab import RUN, new_model, results, save_teacher, write_data

pytest.importorskip('ultralytics')
pytest.importorskip('cloudpickle')

REPO = Path(__file__).parents[2]


def launch(tmp_path, data, name, callback):
    """Run the worker script on two ranks; returns the run's folder, the report of each rank and the script's state."""
    from ultralytics.utils.dist import ddp_cleanup, generate_ddp_command

    from tests.integration.yolo_ddp import CPUTrainer

    model = new_model('yolo26n.yaml')
    if callback is not None:
        callback.register(model)
    overrides = {**model.overrides, **RUN, 'epochs': 2, 'data': data, 'project': str(tmp_path), 'name': name}
    trainer = CPUTrainer(overrides=overrides, _callbacks=model.callbacks)
    command, file = generate_ddp_command(trainer)
    report = tmp_path / f'report_{name}'
    report.mkdir()
    environment = {**os.environ, 'KD_REPORT': str(report), 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
    size = Path(file).with_suffix('.pt').stat().st_size
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
    finally:
        ddp_cleanup(trainer, file)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((report / f'{r}.json').read_text()) for r in range(2)]
    return tmp_path / name, ranks, size, done


@pytest.mark.slow
def test_two_ranks(tmp_path):
    data = write_data(tmp_path / 'data')
    teacher = save_teacher(tmp_path / 'teacher.pt', 'yolo26s.yaml')
    # Of other widths: with adapters.
    callback = DistillCallback(teacher, feature=1.0)
    run, ranks, size, done = launch(tmp_path, data, 'kd', callback)
    _, plain, plain_size, _ = launch(tmp_path, data, 'plain', None)
    assert ranks[0]['parameters'] == ranks[1]['parameters'] != plain[0]['parameters']
    # Both ranks distil, on different images.
    assert all(r['criterion'] == 'KDCriterion' for r in ranks)
    kd = [r['items']['kdcls_loss'] for r in ranks]
    assert min(kd) > 0 and kd[0] != kd[1]
    assert all(v > 0 for v in results(run)['train/kdcls_loss'])
    # One set of adapters, which both ranks train.
    assert ranks[0]['adapters'] == ranks[1]['adapters'] and ranks[0]['adapter_steps'] == ranks[0]['steps'] > 0
    assert (run / 'weights/kd_last.pt').exists()
    # What travels to the workers is the options, not the teacher.
    assert size - plain_size < 20_000 < os.path.getsize(teacher)
    assert (done.stdout + done.stderr).count('Knowledge distillation is ON') == 1
