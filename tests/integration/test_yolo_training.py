"""Distilled runs of Ultralytics' own trainer: what is logged, saved, restored, and what a plain run would be."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.yolo import DistillCallback
from tests.integration.yolo_lab import (
    build,
    new_model,
    results,
    save_teacher,
    train,
    weights_hash,
    write_data,
    write_small,
)

pytest.importorskip('ultralytics')

from ultralytics import YOLO

KD = ('train/kdcls_loss', 'train/kdbox_loss')
REPO = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('data'), empty=2)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp('teacher') / 'teacher.pt', 'yolov8n.yaml')


@pytest.fixture
def distilled(teacher):
    """``distilled(cfg, **options)``: a model with a registered callback, and the callback."""

    def build(cfg='yolo11n.yaml', file=teacher, **options):
        model = new_model(cfg)
        return model, DistillCallback(file, **options).register(model)

    return build


class Spy:
    """Notes what happens during a run, through Ultralytics' own events."""

    def __init__(self, model, callback):
        self.callback, self.criteria, self.calls, self.prints, self.trainer = callback, [], [], [], None
        model.add_callback('on_train_start', self.start)
        model.add_callback('on_train_epoch_end', self.epoch)
        model.add_callback('on_train_end', self.end)

    def start(self, trainer):
        self.trainer, self.teacher = trainer, self.callback.session.teacher
        self.prints.append(self.teacher.fingerprint())
        inner = self.teacher.model.forward
        self.teacher.model.forward = lambda *args, **kwargs: self.calls.append(trainer.epoch) or inner(*args, **kwargs)
        self.student = self.callback.session.student

    def epoch(self, trainer):
        self.criteria.append(type(trainer.model.criterion))

    def end(self, trainer):
        self.prints.append(self.teacher.fingerprint())


def logged(caplog):
    return '\n'.join(r.getMessage() for r in caplog.records)


def test_columns_summary_and_life_cycle(distilled, data, tmp_path, caplog):
    from kd_plugins.yolo.criterion import KDCriterion

    model, callback = distilled()
    spy = Spy(model, callback)
    run = train(model, data, tmp_path, epochs=2)
    found = results(run)
    assert all(v > 0 for k in KD for v in found[k])
    # There is no KD in validation, and one teacher forward per training batch.
    assert found['val/kdcls_loss'] == [0, 0] and found['val/box_loss'][0] > 0
    assert spy.calls == [0, 0, 1, 1]
    assert spy.criteria == [KDCriterion] * 2 and spy.prints[0] == spy.prints[1]
    assert type(spy.student.criterion).__name__ == 'v8DetectionLoss' and callback.session is None
    text = logged(caplog)
    for part in (
        'Knowledge distillation is ON',
        'BinaryKLDivLoss',
        'LocalizationDistillLoss',
        'strides 8/16/32, 3',
    ):
        assert part in text
    from ultralytics.utils import YAML

    from kd_plugins.yolo import DistillOptions

    recorded = DistillOptions.from_dict(YAML.load(run / 'kd.yaml'))
    assert list(recorded.terms) == ['cls', 'box'] and recorded.teacher == callback.options.teacher
    assert recorded.terms['box']['loss']['type'] == 'LocalizationDistillLoss'
    # Run from its own record, it is the same run.
    again = new_model('yolo11n.yaml')
    DistillCallback(recorded).register(again)
    assert weights_hash(train(again, data, tmp_path, 'again', epochs=2) / 'weights/last.pt') == weights_hash(
        run / 'weights/last.pt'
    )


def test_student_comes_closer_to_the_teacher(distilled, data, tmp_path):
    """More so than by the labels alone: an untrained teacher knows nothing that the labels say."""
    options = dict(epochs=10, mosaic=0.0, optimizer='AdamW', lr0=0.005, batch=4, nbs=4, val=False)
    # Nearly the same scores everywhere can be learned in 20 steps.
    file = save_teacher(tmp_path / 'even.pt', 'yolov8n.yaml', spread=0.03)
    model, _ = distilled(file=file)
    found = results(train(model, data, tmp_path, 'kd', **options))
    small = 1e-3
    model, _ = distilled(file=file, cls=small, box=small)
    plain = results(train(model, data, tmp_path, 'plain', **options))
    assert found[KD[0]][-1] < 0.95 * found[KD[0]][0]
    # How near the boxes are after an epoch of two steps varies a lot between processors, therefore over several.
    assert all(sum(found[column][5:]) < 0.95 * sum(plain[column][5:]) / small for column in KD)


def test_export_to_onnx(distilled, data, tmp_path):
    """As the same student does that was trained elsewhere: the same graph, and what the weights say."""
    onnx, runtime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    model, _ = distilled()
    train(model, data, tmp_path, 'kd')
    train(new_model('yolo11n.yaml'), data, tmp_path, 'plain')
    graphs = {}
    for name in ('kd', 'plain'):
        # Simplifying needs another package, which Ultralytics would install by itself.
        graphs[name] = YOLO(tmp_path / name / 'weights/last.pt').export(format='onnx', imgsz=64, simplify=False)
    nodes = {name: [n.op_type for n in onnx.load(file).graph.node] for name, file in graphs.items()}
    assert nodes['kd'] == nodes['plain'] and len(nodes['kd']) > 100
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession(graphs['kd'], providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    # The weights alone, in a model that was never near a callback.
    other = build('yolo11n.yaml')
    other.load_state_dict(YOLO(tmp_path / 'kd/weights/last.pt').model.float().state_dict())
    with torch.no_grad():
        expected = other.eval()(image)[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_compiled(distilled, data, tmp_path):
    """The student runs as compiled code and is distilled, at its head and in its neck; the file holds plain names."""
    # Compiling YOLO11n takes minutes.
    cfg = write_small(tmp_path / 'few.yaml')
    model, callback = distilled(cfg, feature=1.0)
    spy = Spy(model, callback)
    kinds = []
    model.add_callback('on_train_start', lambda t: kinds.append(type(t.model).__name__))
    run = train(model, data, tmp_path, compile=True)
    assert kinds == ['OptimizedModule'], 'it was compiled'
    found = results(run)
    columns = [c for c in found if c.startswith('train/kd')]
    assert columns and all(v > 0 for c in columns for v in found[c]) and spy.prints[0] == spy.prints[1]
    plain = train(new_model(cfg), data, tmp_path, 'plain')
    keys = [list(YOLO(r / 'weights/last.pt').model.state_dict()) for r in (run, plain)]
    assert keys[0] == keys[1]


def test_exception_restores_and_a_second_train_works(distilled, data, tmp_path):
    model, callback = distilled()
    spy = Spy(model, callback)

    def crash(trainer):
        if not crashed:
            crashed.append(1)
            raise RuntimeError('crash')

    crashed = []
    model.add_callback('on_train_batch_end', crash)
    with pytest.raises(RuntimeError, match='crash'):
        train(model, data, tmp_path, 'first')
    assert type(spy.student.criterion).__name__ == 'v8DetectionLoss' and callback.session is None
    for name in ('second', 'third'):
        assert results(train(model, data, tmp_path, name))[KD[0]][0] > 0


def test_nan_recovery_leaves_a_plain_criterion(distilled, data, tmp_path, caplog):
    model, callback = distilled('yolo26n.yaml')
    spy = Spy(model, callback)
    seen = []

    def poison(trainer):
        if trainer.epoch == 1 and not seen:
            seen.append(1)
            trainer.loss = torch.tensor(float('nan'))

    model.add_callback('on_train_epoch_end', poison)
    run = train(model, data, tmp_path, epochs=3, val=False)
    assert 'recovering from last.pt' in logged(caplog)
    assert type(spy.trainer.ema.ema.criterion).__name__ == 'E2ELoss'
    assert len(results(run)[KD[0]]) == 3 and min(results(run)[KD[0]]) > 0
    assert spy.calls.count(1) == 4  # the epoch was done again, with KD


def test_out_of_memory_in_the_teacher_halves_the_batch(distilled, data, tmp_path, caplog):
    model, callback = distilled()
    spy = Spy(model, callback)

    def arm(trainer):
        inner = spy.teacher.model.forward

        def forward(x):
            if x.shape[0] > 2:
                raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')
            return inner(x)

        spy.teacher.model.forward = forward

    model.add_callback('on_train_start', arm)
    run = train(model, data, tmp_path, epochs=2)
    assert 'Reducing to batch=2' in logged(caplog)
    assert all(v > 0 for v in results(run)[KD[0]]) and spy.trainer.batch_size == 2


def test_resume_after_sigkill_continues(teacher, data, tmp_path):
    code = f"""
        import os, signal, sys
        from tests.integration.yolo_lab import build, new_model, train
        from kd_plugins.yolo import DistillCallback
        from ultralytics import YOLO
        resume = len(sys.argv) > 1
        model = YOLO({str(tmp_path / 'run/weights/last.pt')!r}) if resume else new_model('yolo26n.yaml')
        DistillCallback({teacher!r}).register(model)
        if resume:
            seen = []
            model.add_callback('on_train_epoch_start', lambda t: seen.append((t.model.criterion.o2m, t.epoch)))
            model.train(resume=True)
            print('O2M', seen)
        else:
            model.add_callback('on_fit_epoch_end', lambda t: t.epoch == 1 and os.kill(os.getpid(), signal.SIGKILL))
            train(model, {data!r}, {str(tmp_path)!r}, epochs=4)
    """
    first = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=REPO, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL, first.stderr[-2000:]
    assert len(results(tmp_path / 'run')['epoch']) == 2
    second = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), 'resume'], cwd=REPO, capture_output=True, text=True
    )
    assert second.returncode == 0, second.stderr[-2000:]
    found = results(tmp_path / 'run')
    assert found['epoch'] == [1, 2, 3, 4] and all(v > 0 for k in KD for v in found[k])
    # The resumed criterion, whose one-to-many factor has decayed, is kept: 0.8 -> 0.1 over 4 epochs.
    seen = eval(second.stdout.split('O2M')[1].strip().splitlines()[0])
    assert [round(o2m, 3) for o2m, _ in seen] == [round(0.1 + 0.7 * (1 - e / 3), 3) for _, e in seen]
    assert [e for _, e in seen] == [2, 3]


SITUATIONS = {
    'multi-scale': dict(multi_scale=0.5),
    'freeze': dict(freeze=5),
    'accumulation': dict(batch=2, nbs=8),
    'close-mosaic': dict(epochs=2, mosaic=1.0, close_mosaic=1),
    'rect': dict(rect=True),
    'no-val': dict(val=False),
    'cosine-adam': dict(optimizer='AdamW', cos_lr=True),
    'one-image-batches': dict(batch=1),
    'fraction': dict(fraction=0.5),
}


@pytest.mark.parametrize('options', SITUATIONS.values(), ids=SITUATIONS)
def test_options_of_the_trainer(distilled, data, tmp_path, options):
    model, callback = distilled('yolo26n.yaml')
    spy = Spy(model, callback)
    found = results(train(model, data, tmp_path, **options))
    assert all(v > 0 for k in KD for v in found[k]) and spy.prints[0] == spy.prints[1]


def test_only_empty_images(distilled, tmp_path):
    data = write_data(tmp_path / 'data', empty=8)
    model, _ = distilled()
    found = results(train(model, data, tmp_path))
    assert found['train/box_loss'] == [0] and found[KD[0]][0] > 0


def test_several_data_sets(distilled, data, tmp_path):
    other = write_data(tmp_path / 'other', seed=5)
    model, _ = distilled()
    found = model.train(
        data=[data, other],
        imgsz=64,
        epochs=1,
        batch=4,
        workers=0,
        device='cpu',
        amp=False,
        plots=False,
        project=str(tmp_path / 'sweep'),
    )
    assert len(found) == 2 and all(found.values())
    runs = sorted((tmp_path / 'sweep').rglob('results.csv'))
    assert len(runs) == 2 and all(results(r.parent)[KD[0]][0] > 0 for r in runs)


def test_native_distillation_at_the_same_time(distilled, data, tmp_path, teacher):
    model, _ = distilled('yolo26n.yaml')
    own = save_teacher(tmp_path / 'native.pt', 'yolo26n.yaml', seed=9)
    found = results(train(model, data, tmp_path, distill_model=own, epochs=2))
    assert all(v > 0 for k in (*KD, 'train/dis_loss') for v in found[k])


@pytest.mark.parametrize('weight, text', [(1e3, 'times the task loss'), (1e-5, 'of the task loss: it hardly')])
def test_out_of_proportion_is_reported_once(distilled, data, tmp_path, caplog, weight, text):
    model, _ = distilled(cls=weight, box=0)
    train(model, data, tmp_path, epochs=3, lr0=1e-6)
    assert logged(caplog).count(text) == 1


def test_in_proportion_is_not_reported(distilled, data, tmp_path, caplog):
    model, _ = distilled(cls=0.5, box=0.5)
    train(model, data, tmp_path)
    assert 'of the task loss' not in logged(caplog) and 'times the task loss' not in logged(caplog)


@pytest.mark.long  # test_unmodified_yolo sees the same from the command line
def test_merely_installed_changes_nothing(data, tmp_path):
    """Importing our package leaves a plain run as it is."""
    code = f"""
        import sys
        if len(sys.argv) > 1:
            import kd_plugins.yolo
        from tests.integration.yolo_lab import build, new_model, train, weights_hash
        run = train(new_model('yolo11n.yaml'), {data!r}, {str(tmp_path)!r}, sys.argv[-1].replace('-c', 'plain'))
        print('HASH', weights_hash(run / 'weights/last.pt'))
        assert len(sys.argv) > 1 or not any(m.startswith('kd_plugins') for m in sys.modules)
    """
    found = [
        subprocess.run([sys.executable, '-c', textwrap.dedent(code), *extra], cwd=REPO, capture_output=True, text=True)
        for extra in ((), ('imported',))
    ]
    assert all(f.returncode == 0 for f in found), [f.stderr[-1000:] for f in found]
    assert len({f.stdout.split('HASH')[1] for f in found}) == 1


def test_teacher_in_another_folder_is_found(distilled, teacher, data, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(teacher).parent)
    model, callback = distilled(file='teacher.pt')
    assert callback.options.teacher == teacher and os.path.isabs(callback.options.teacher)
    monkeypatch.chdir(tmp_path)
    assert results(train(model, data, tmp_path))[KD[0]][0] > 0


def test_a_teacher_that_vanished_is_reported(distilled, data, tmp_path):
    file = save_teacher(tmp_path / 'gone.pt', 'yolo11n.yaml')
    model, _ = distilled(file=file)
    os.remove(file)
    with pytest.raises((DistillError, FileNotFoundError), match=r'gone\.pt'):
        train(model, data, tmp_path)
