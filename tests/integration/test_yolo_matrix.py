"""Pairs of students and teachers, tasks, class sets, and what is refused, in real runs."""

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.yolo import DistillCallback
from tests.integration.yolo_lab import new_model, results, save_teacher, train, write_data

pytest.importorskip('ultralytics')

KD = ('train/kdcls_loss', 'train/kdbox_loss')
NAMES = ('red', 'green', 'blue')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """``data(task)``: a tiny data set of a task, written once."""
    written = {}

    def get(task='detect'):
        if task not in written:
            written[task] = write_data(tmp_path_factory.mktemp(task), task=task, images=4)
        return written[task]

    return get


def text_of(caplog):
    return '\n'.join(r.getMessage() for r in caplog.records)


def distil(student, file, data, tmp_path, **options):
    model = new_model(student)
    run = {k: options.pop(k) for k in ('imgsz', 'single_cls', 'epochs') if k in options}
    DistillCallback(file, **options).register(model)
    return results(train(model, data, tmp_path, batch=2, val=False, **run))


# student, teacher, task of the data, box loss that fits, sides
PAIRS = [
    ('yolo11n.yaml', 'yolov8n.yaml', 'detect', 'LocalizationDistillLoss', {}),
    ('yolov8n.yaml', 'yolo11s.yaml', 'detect', 'LocalizationDistillLoss', {}),
    ('yolo26n.yaml', 'yolov8n.yaml', 'detect', 'BoxIoULoss', {}),
    ('yolov8n.yaml', 'yolo26n.yaml', 'detect', 'BoxIoULoss', {}),
    ('yolo26n.yaml', 'yolov10n.yaml', 'detect', 'BoxIoULoss', {}),
    ('yolov10n.yaml', 'yolov9t.yaml', 'detect', 'LocalizationDistillLoss', {}),
    ('yolo26n.yaml', 'yolo26s.yaml', 'detect', 'BoxIoULoss', {}),
    ('yolov5n.yaml', 'yolo12n.yaml', 'detect', 'LocalizationDistillLoss', {}),
    ('yolov8n-p2.yaml', 'yolov8n.yaml', 'detect', 'LocalizationDistillLoss', {}),
    ('yolov8n.yaml', 'yolov8n-p2.yaml', 'detect', 'LocalizationDistillLoss', {}),
    ('yolov8n.yaml', 'yolov8n-p6.yaml', 'detect', 'LocalizationDistillLoss', dict(imgsz=96)),
    ('yolo11n.yaml', 'yolo11n-seg.yaml', 'detect', 'LocalizationDistillLoss', {}),
    ('yolo11n-seg.yaml', 'yolov8n-seg.yaml', 'segment', 'LocalizationDistillLoss', {}),
    ('yolo11n-seg.yaml', 'yolo11n.yaml', 'segment', 'LocalizationDistillLoss', {}),
    ('yolo26n-seg.yaml', 'yolo26n-seg.yaml', 'segment', 'BoxIoULoss', {}),
    ('yolo11n-pose.yaml', 'yolo26n-pose.yaml', 'pose', 'BoxIoULoss', {}),
    ('yolo26n-pose.yaml', 'yolo26n-pose.yaml', 'pose', 'BoxIoULoss', {}),
    ('yolo11n-obb.yaml', 'yolov8n-obb.yaml', 'obb', 'LocalizationDistillLoss', {}),
    ('yolo26n-obb.yaml', 'yolo26n-obb.yaml', 'obb', 'BoxL1Loss', {}),
]


#: One of each kind; the others are of `make test-long`.
QUICK = {
    ('yolo11n.yaml', 'yolov8n.yaml'),
    ('yolo26n.yaml', 'yolov8n.yaml'),
    ('yolov8n.yaml', 'yolo26n.yaml'),
    ('yolov8n-p2.yaml', 'yolov8n.yaml'),
    ('yolov8n.yaml', 'yolov8n-p6.yaml'),
    ('yolo11n-seg.yaml', 'yolo11n.yaml'),
    ('yolo26n-seg.yaml', 'yolo26n-seg.yaml'),
    ('yolo11n-pose.yaml', 'yolo26n-pose.yaml'),
    ('yolo11n-obb.yaml', 'yolov8n-obb.yaml'),
}


@pytest.mark.parametrize(
    'student, teacher, task, box, run',
    [
        pytest.param(*pair, id=f'{pair[1][:-5]}->{pair[0][:-5]}', marks=() if pair[:2] in QUICK else pytest.mark.long)
        for pair in PAIRS
    ],
)
def test_pairs(data, tmp_path, caplog, student, teacher, task, box, run):
    file = save_teacher(tmp_path / 'teacher.pt', teacher, seed=4)
    found = distil(student, file, data(task), tmp_path, **run)
    assert all(0 < v < 1e4 for k in KD for v in found[k])
    assert box in text_of(caplog)


@pytest.mark.parametrize('options', [dict(branch='one2one'), dict(branch='both'), dict(cls_loss='l2', box_loss='l2')])
@pytest.mark.parametrize('teacher', ['yolov8n.yaml', 'yolo26n.yaml'])
def test_branches_and_l2(data, tmp_path, teacher, options):
    file = save_teacher(tmp_path / 'teacher.pt', teacher)
    found = distil('yolo26n.yaml', file, data(), tmp_path, **options)
    assert all(v > 0 for k in KD for v in found[k])


def test_features_of_equal_channels(data, tmp_path):
    file = save_teacher(tmp_path / 'teacher.pt', 'yolo11n.yaml')
    found = distil('yolo11n.yaml', file, data(), tmp_path, cls=0, box=0, feature=0.5)
    assert found['train/kdfea_loss'][0] > 0 and not set(KD) & set(found)


# ------------------------------------------------------------------ class sets
@pytest.mark.parametrize(
    'names, options, text',
    [
        (('sky', 'blue', 'red'), {}, '2 of 3 student classes taught by name (teacher knows 3)'),
        (('RED', 'Green', 'blue', 'cat', 'dog'), {}, '3 of 3 student classes taught by name (teacher knows 5)'),
        (('r', 'green', 'b'), dict(class_map={'red': 'r', 'blue': 'b'}), 'the same 3 classes'),
        (('0', '1', '2'), dict(classes=NAMES), 'the same 3 classes'),
    ],
    ids=['subset', 'more', 'map', 'given'],
)
def test_classes_by_name(data, tmp_path, caplog, names, options, text):
    file = save_teacher(tmp_path / 'teacher.pt', 'yolov8n.yaml', names=names)
    found = distil('yolo11n.yaml', file, data(), tmp_path, **options)
    assert all(v > 0 for k in KD for v in found[k]) and text in text_of(caplog)


# ------------------------------------------------------------------ classify
@pytest.mark.parametrize('loss', ['auto', 'kl', 'dkd', 'hard', dict(type='KLDivLoss', standardize=True)], ids=str)
def test_classify(data, tmp_path, loss):
    file = save_teacher(tmp_path / 'teacher.pt', 'yolov8n-cls.yaml', names=sorted(NAMES))
    found = distil('yolo11n-cls.yaml', file, data('classify'), tmp_path, cls_loss=loss)
    assert found['train/kdcls_loss'][0] > 0 and KD[1] not in found and found['train/loss'][0] > 0


def test_classify_is_a_mean_over_the_batch(data, tmp_path):
    """The same loss at batch 2 and 4, up to the order of the images."""
    file = save_teacher(tmp_path / 'teacher.pt', 'yolov8n-cls.yaml', names=sorted(NAMES))
    values = []
    for batch in (1, 4):
        model = new_model('yolo11n-cls.yaml')
        seen = []
        DistillCallback(file, cls=10.0).register(model)
        model.add_callback('on_train_batch_end', lambda t, seen=seen: seen.append((t.loss.item(), dict(t.loss_items))))
        train(model, data('classify'), tmp_path, str(batch), batch=batch, val=False, lr0=1e-9)
        total, items = seen[0]
        assert total == pytest.approx(items['loss'].item() + items['kdcls_loss'].item(), rel=1e-5)
        values.append(items['kdcls_loss'].item())
    assert 0.2 < values[0] / values[1] < 5


def test_classes_of_a_classifier_by_name(data, tmp_path, caplog):
    file = save_teacher(tmp_path / 'teacher.pt', 'yolov8n-cls.yaml', names=('cat', 'red', 'blue', 'dog'))
    found = distil('yolo11n-cls.yaml', file, data('classify'), tmp_path)
    assert found['train/kdcls_loss'][0] > 0 and '2 of 3 student classes taught by name' in text_of(caplog)


# ------------------------------------------------------------------ refused, before the first batch
REFUSED = [
    ('yolo11n.yaml', 'detect', dict(cfg='yolov8n.yaml', names=('a', 'b', 'c')), {}, 'no class in common.*class_map='),
    ('yolo11n.yaml', 'detect', dict(cfg='yolov8n.yaml'), dict(single_cls=True), "student has 'item'.*class_map="),
    (
        'yolo11n.yaml',
        'detect',
        dict(cfg='yolov8n.yaml'),
        dict(classes=('red', 'green')),
        'classes has 2 names but the teacher predicts 3 classes',
    ),
    (
        'yolo11n.yaml',
        'detect',
        dict(cfg='yolov8n.yaml'),
        dict(class_map={'rde': 'red'}),
        "no class 'rde'; did",
    ),
    ('yolo11n.yaml', 'detect', dict(cfg='yolov8n.yaml'), dict(class_map={'red': 'rot'}), "teacher has no class 'rot'"),
    ('yolo11n.yaml', 'detect', dict(cfg='yolov8n-cls.yaml'), {}, 'student is a detector and the teacher a classifier'),
    (
        'yolo11n-cls.yaml',
        'classify',
        dict(cfg='yolo11n.yaml'),
        {},
        'student is a classifier and the teacher a detector',
    ),
    ('yolo11n-cls.yaml', 'classify', dict(cfg='yolov8n-cls.yaml'), dict(box=1.0), 'has no boxes or pyramid'),
    (
        'yolo11n-cls.yaml',
        'classify',
        dict(cfg='yolov8n-cls.yaml'),
        dict(cls_loss='bce', temperature=-0.0),
        'temperature',
    ),
    (
        'yolo11n-cls.yaml',
        'classify',
        dict(cfg='yolov8n-cls.yaml'),
        dict(cls_loss='l2'),
        'compares detection heads; take a loss for classif',
    ),
    (
        'yolo11n.yaml',
        'detect',
        dict(cfg='yolov8n.yaml'),
        dict(cls_loss='kl'),
        'a sigmoid each; write .*BinaryKLDivLoss',
    ),
    ('yolo11n.yaml', 'detect', dict(cfg='yolov8n.yaml'), dict(branch='both'), 'the student is not end-to-end'),
    ('yolo26n.yaml', 'detect', dict(cfg='yolov8n.yaml'), dict(box_loss='ld'), 'student.*does not .*reg_max=1'),
    (
        'yolo11n.yaml',
        'detect',
        dict(cfg='yolo11n-obb.yaml'),
        {},
        r'its boxes are rotated\); leave the boxes out \(weight 0\)',
    ),
    ('yolo11n.yaml', 'detect', dict(cfg='yolov8n.yaml'), dict(start=5), 'start=5 is not before the end of the run'),
    ('yolo11n.yaml', 'detect', dict(cfg='yolov8n.yaml', ch=1), {}, r'images of 3 channel\(s\) and the teacher of 1'),
]


@pytest.mark.parametrize('student, task, teacher, options, message', REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused(data, tmp_path, student, task, teacher, options, message):
    if teacher.get('names') is None and task == 'classify':
        teacher = {**teacher, 'names': sorted(NAMES)}
    file = save_teacher(tmp_path / 'teacher.pt', **teacher)
    with pytest.raises(DistillError, match=message):
        distil(student, file, data(task), tmp_path, **options)


def test_an_rtdetr_student_is_refused(data, tmp_path):
    from ultralytics import RTDETR

    model = RTDETR('yolov8n-rtdetr.yaml')
    DistillCallback(save_teacher(tmp_path / 'teacher.pt', 'yolov8n.yaml')).register(model)
    with pytest.raises(DistillError, match=r'student has the head RTDETRDecoder.*supported are detect, segment'):
        train(model, data(), tmp_path, batch=2)


def test_an_upright_student_may_learn_the_classes_of_an_obb_teacher(data, tmp_path):
    file = save_teacher(tmp_path / 'teacher.pt', 'yolo11n-obb.yaml')
    found = distil('yolo11n.yaml', file, data(), tmp_path, box=0)
    assert found[KD[0]][0] > 0 and KD[1] not in found


def test_student_that_starts_as_the_teacher(data, tmp_path, caplog):
    """Not an error: so do people begin who add classes without forgetting, or prune."""
    from ultralytics import YOLO

    file = save_teacher(tmp_path / 'teacher.pt', 'yolo11n.yaml')
    model = YOLO(file)
    DistillCallback(file).register(model)
    found = results(train(model, data(), tmp_path, val=False, epochs=2))
    assert 'student and teacher are equal so far' in text_of(caplog)
    assert all(v > 0 for k in KD for v in found[k])


def test_registering(tmp_path):
    file = save_teacher(tmp_path / 'teacher.pt', 'yolo11n.yaml')
    model = new_model('yolo11n.yaml')
    before = {k: list(v) for k, v in model.callbacks.items()}
    callback = DistillCallback(file).register(model)
    with pytest.raises(DistillError, match='already has a DistillCallback'):
        DistillCallback(file).register(model)
    callback.unregister(model)
    assert {k: list(v) for k, v in model.callbacks.items() if v} == {k: v for k, v in before.items() if v}
    with pytest.raises(DistillError, match='register expects the model'):
        callback.register('yolo11n.yaml')
    with pytest.raises(DistillError, match='register expects the model'):
        callback.register(torch.nn.Linear(1, 1))
    with pytest.raises(DistillError, match="DistillCallback has no option 'temprature': did you mean 'temperature'"):
        DistillCallback(file, temprature=1)
    with pytest.raises(DistillError, match='given twice'):
        DistillCallback(callback.options, cls=1.0)
    assert DistillCallback(callback.options).options == callback.options


def test_old_ultralytics_is_refused(tmp_path, monkeypatch):
    import ultralytics

    callback = DistillCallback(save_teacher(tmp_path / 'teacher.pt', 'yolo11n.yaml'))
    for version in ('8.4.139', '8.3.200', '8.4'):
        monkeypatch.setattr(ultralytics, '__version__', version)
        with pytest.raises(DistillError, match=f'ultralytics {version} is too old.*multi-GPU.*8.4.140'):
            callback.register(new_model('yolo11n.yaml'))
    for version in ('8.4.140', '8.4.1000', '8.5.0rc1'):
        monkeypatch.setattr(ultralytics, '__version__', version)
        callback.register(new_model('yolo11n.yaml'))
