"""Features taught inside Ultralytics' trainer: methods, widths, families, levels, and what trains the adapters."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from kd_plugins.yolo import DistillCallback
from tests.integration.yolo_lab import new_model, results, save_teacher, train, weights_hash, write_data, write_small

pytest.importorskip('ultralytics')

REPO = Path(__file__).parents[2]
SMALL = dict(
    small=dict(),
    wide=dict(widths=(24, 48, 64)),
    wide26=dict(widths=(24, 48, 64), end_to_end=True),
    p2=dict(levels='1, 2, 3, 4'),
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('features')


@pytest.fixture(scope='module')
def data(folder):
    return write_data(folder / 'data', images=4)


@pytest.fixture(scope='module')
def cfg(folder):
    """``cfg(name)``: the yaml of a small model, or of one of Ultralytics."""
    return lambda name: write_small(folder / f'{name}.yaml', **SMALL[name]) if name in SMALL else f'{name}.yaml'


@pytest.fixture(scope='module')
def teacher(folder, cfg):
    """``teacher(name)``: its file, written once."""

    def save(name):
        file = folder / f'{name}.pt'
        return str(file) if file.exists() else save_teacher(file, cfg(name))

    return save


def text_of(caplog):
    return '\n'.join(r.getMessage() for r in caplog.records)


def distil(student, file, data, folder, run=None, watch=None, **options):
    """A tiny run; returns its folder and the model."""
    model = new_model(student)
    callback = DistillCallback(file, **options).register(model)
    if watch is not None:
        watch(model, callback)
    return train(model, data, folder, **{'batch': 2, 'val': False, **(run or {})})


class Steps:
    """Notes the adapters of a run and how often they and the student stepped."""

    def __init__(self, model, callback):
        self.callback, self.student, self.before = callback, 0, {}
        model.add_callback('on_train_start', self.start)
        model.add_callback('on_train_batch_end', self.batch)

    def start(self, trainer):
        self.before = self.callback.session.bank.export_state()
        trainer.optimizer.register_step_post_hook(self.step)

    def step(self, *step):
        self.student += 1

    def batch(self, trainer):
        session = self.callback.session
        self.adapters, self.after = session.optimizer.steps, session.bank.export_state()
        self.waiting = any(p.grad is not None for p in session.bank.parameters())


@pytest.mark.parametrize('tap', ['neck', 'model.3'])
@pytest.mark.parametrize('loss', ['cwd', 'mgd', 'pkd', 'mse', 'cosine'])
def test_methods_between_other_widths(cfg, teacher, data, tmp_path, loss, tap):
    from kd_plugins.yolo.options import SHORT_LOSSES

    term = dict(loss=SHORT_LOSSES['feature_loss'][loss], student=tap, teacher=tap)
    seen = []
    run = distil(
        cfg('small'), teacher('wide'), data, tmp_path, watch=lambda *a: seen.append(Steps(*a)), terms={'feature': term}
    )
    found = results(run)
    assert found['train/kdfea_loss'][0] > 0 and 'train/kdcls_loss' not in found
    (steps,) = seen
    assert steps.adapters == steps.student > 0
    assert not any(torch.equal(steps.before[k], steps.after[k]) for k in steps.before)


PAIRS = [
    ('yolo11n', 'yolov8s', '128x12x12, 256x6x6, 512x3x3', ''),
    ('yolo26n', 'yolo11s', '128x12x12, 256x6x6, 512x3x3', ''),
    ('yolov8n', 'wide26', '24x12x12, 48x6x6, 64x3x3', ''),
    ('p2', 'wide', '24x12x12, 48x6x6', 'compares strides 8/16/32; not 4 of the student'),
    ('small', 'p2', '16x12x12', 'compares strides 8/16/32; not 4 of the teacher'),
    ('small', 'yolov8n-p6', '64x12x12', 'compares strides 8/16/32; not 64 of the teacher'),
]


@pytest.mark.parametrize(
    'student, file, shapes, note',
    # Every other one is of `make test-long`.
    [
        pytest.param(*pair, id=f'{pair[1]}->{pair[0]}', marks=pytest.mark.long if i % 2 else ())
        for i, pair in enumerate(PAIRS)
    ],
)
def test_families_and_levels(cfg, teacher, data, tmp_path, caplog, student, file, shapes, note):
    """Levels are paired by stride, and what is left out is named."""
    run = distil(cfg(student), teacher(file), data, tmp_path, cls=0, box=0, feature=1.0, run=dict(imgsz=96))
    assert results(run)['train/kdfea_loss'][0] > 0
    # A cell of the summary may be wrapped.
    found = text_of(caplog)
    assert all(shape in found for shape in shapes.split(', ')) and note in found


@pytest.mark.parametrize(
    'run', [dict(nbs=2), dict(nbs=4), dict(nbs=8, epochs=2), dict(nbs=4, optimizer='AdamW')], ids=str
)
def test_adapters_step_when_the_student_does(cfg, teacher, data, tmp_path, run):
    """Gradients accumulate as the student's do."""
    seen = []
    distil(cfg('small'), teacher('wide'), data, tmp_path, run, lambda *a: seen.append(Steps(*a)), feature=1.0)
    (steps,) = seen
    assert steps.adapters == steps.student == max(1, 2 * run.get('epochs', 1) * 2 // run['nbs'])


def test_the_students_file_knows_nothing_of_the_adapters(cfg, teacher, data, tmp_path):
    run = distil(cfg('small'), teacher('wide'), data, tmp_path, feature=1.0)
    plain = train(new_model(cfg('small')), data, tmp_path, 'plain', batch=2, val=False)
    sizes = [(r / 'weights/last.pt').stat().st_size for r in (run, plain)]
    assert abs(sizes[0] - sizes[1]) < 4096
    saved = torch.load(run / 'weights/kd_last.pt', weights_only=True)
    assert list(saved['epochs']) == [0] and saved['epochs'][0]['adapters']
    assert not (plain / 'weights/kd_last.pt').exists()


def test_killed_and_resumed_goes_on_with_the_adapters(cfg, teacher, data, tmp_path):
    """Bit by bit as they were at the end of the epoch in last.pt, with momentum; and with the weight that was found."""
    code = f"""
        import os, signal, sys, torch
        from tests.integration.yolo_lab import new_model, train
        from kd_plugins.yolo import DistillCallback
        from ultralytics import YOLO
        folder, name = {str(tmp_path)!r}, sys.argv[1]
        model = YOLO(folder + '/killed/weights/last.pt') if name == 'resume' else new_model({cfg('small')!r})
        callback = DistillCallback({teacher('wide')!r}, feature='auto:0.5', feature_loss='mgd').register(model)
        if name == 'resume':
            model.add_callback('on_train_start', lambda t: torch.save(callback.session.state(), folder + '/start.pt'))
            model.train(resume=True)
            sys.exit()
        if name == 'killed':
            model.add_callback('on_fit_epoch_end', lambda t: t.epoch == 1 and os.kill(os.getpid(), signal.SIGKILL))
        train(model, {data!r}, folder, name, epochs=3, batch=2, nbs=2, val=False)
    """
    for name, expected in (('whole', 0), ('killed', -signal.SIGKILL), ('resume', 0)):
        done = subprocess.run(
            [sys.executable, '-c', textwrap.dedent(code), name],
            cwd=REPO,
            capture_output=True,
            text=True,
            env={**os.environ, 'PYTHONPATH': str(REPO)},
        )
        assert done.returncode == expected, done.stderr[-2000:]
    files = (tmp_path / f'{name}/weights/kd_last.pt' for name in ('whole', 'killed'))
    whole, killed = (torch.load(file, weights_only=True)['epochs'] for file in files)
    start = torch.load(tmp_path / 'start.pt', weights_only=True)
    assert start['steps'] == whole[1]['steps'] == 4 and killed[2]['steps'] == whole[2]['steps'] == 6
    (weight,) = start['weights'].values()
    (expected,) = whole[1]['weights'].values()
    assert weight['asked'] == expected['asked'] == 4 and torch.equal(weight['sums'], expected['sums'])
    changed = []
    for key, value in whole[1]['adapters'].items():
        assert torch.equal(start['adapters'][key], value)
        changed.append(not torch.equal(killed[2]['adapters'][key], value))
    for name, state in whole[1]['optimizer'].items():
        assert torch.equal(start['optimizer'][name]['momentum_buffer'], state['momentum_buffer'])
    assert any(changed)


def test_an_epoch_that_is_done_again_after_a_nan(cfg, teacher, data, tmp_path, caplog):
    """With the adapters that it began with."""
    states, poisoned = {}, []

    def watch(model, callback):
        def begin(trainer):
            states.setdefault(trainer.epoch, []).append(callback.session.bank.export_state())

        def poison(trainer):
            if trainer.epoch == 1 and not poisoned:
                poisoned.append(1)
                trainer.loss = torch.tensor(float('nan'))

        model.add_callback('on_train_epoch_start', begin)
        model.add_callback('on_train_epoch_end', poison)

    distil(cfg('small'), teacher('wide'), data, tmp_path, dict(epochs=2), watch, feature=1.0)
    assert 'recovering from last.pt' in text_of(caplog) and len(states[1]) == 2
    assert all(torch.equal(v, states[1][1][k]) for k, v in states[1][0].items())


def test_out_of_memory_in_the_first_epoch(cfg, teacher, data, tmp_path, caplog):
    """The epoch begins anew, and the adapters step with the student's optimizer as before."""
    seen = []

    def watch(model, callback):
        seen.append(Steps(model, callback))

        def arm(trainer):
            inner = trainer.model.model[0].forward

            def forward(x):
                if x.shape[0] > 2:
                    raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')
                return inner(x)

            trainer.model.model[0].forward = forward

        model.add_callback('on_train_start', arm)

    distil(cfg('small'), teacher('wide'), data, tmp_path, dict(batch=4, nbs=2), watch, feature=1.0)
    assert 'Reducing to batch=2' in text_of(caplog)
    assert seen[0].adapters == 2
    assert not any(torch.equal(seen[0].before[k], seen[0].after[k]) for k in seen[0].before)


def test_multi_scale(cfg, teacher, data, tmp_path):
    run = distil(cfg('small'), teacher('wide'), data, tmp_path, dict(multi_scale=0.5, epochs=2), feature=1.0)
    assert all(v > 0 for v in results(run)['train/kdfea_loss'])


def test_weight_zero_is_bit_by_bit_the_plain_run(cfg, teacher, data, tmp_path):
    plain = train(new_model(cfg('small')), data, tmp_path, 'plain', batch=2, val=False)
    run = distil(cfg('small'), teacher('wide'), data, tmp_path, feature=0.0, cls=0, box=0)
    assert weights_hash(plain / 'weights/last.pt') == weights_hash(run / 'weights/last.pt')
