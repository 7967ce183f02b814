"""Teachers across frameworks, in real runs: mmdet and timm teach Ultralytics students, Ultralytics teaches mmdet."""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import interpolate

from kd_plugins.distiller import Tap
from kd_plugins.errors import DistillError
from kd_plugins.predictions import ClassPredictions, read
from kd_plugins.teachers import ULTRALYTICS, build_source, find_source
from kd_plugins.yolo import DistillCallback
from kd_plugins.yolo.heads import head_of
from tests.integration.yolo_lab import new_model, results, train, write_data
from tests.integration.yolo_lab import save_teacher as save_yolo

pytest.importorskip('ultralytics')
pytest.importorskip('mmdet')
timm = pytest.importorskip('timm')

from tests.integration import synthetic  # noqa: E402

NAMES = ('red', 'green', 'blue')
HEADS = dict(student='bbox_head', teacher='bbox_head')
TERMS = dict(
    cls=dict(loss=dict(type='BinaryKLDivLoss', foreground=True), **HEADS),
    box=dict(loss=dict(type='BoxIoULoss'), **HEADS),
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    written = {}

    def get(task='detect'):
        if task not in written:
            written[task] = write_data(tmp_path_factory.mktemp(task), task=task, images=4)
        return written[task]

    return get


def confident(state):
    """Class and objectness scores of an untrained YOLOX, spread so that it is confident about some positions."""
    generator = torch.Generator().manual_seed(0)
    for key, value in state.items():
        if 'conv_cls' in key or 'conv_obj' in key:
            value.copy_(torch.randn(value.shape, generator=generator))


@pytest.fixture(scope='module')
def yolox_teacher(tmp_path_factory):
    return synthetic.save_teacher(
        synthetic.yolox(3), tmp_path_factory.mktemp('yolox'), ('blue', 'cat', 'red'), edit=confident
    )


@pytest.fixture(scope='module')
def timm_teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp('timm') / 'resnet18.pth'
    torch.manual_seed(0)
    torch.save(timm.create_model('resnet18', num_classes=3).state_dict(), path)
    return dict(timm='resnet18', checkpoint=str(path), num_classes=3, classes=sorted(NAMES))


def distil(student, teacher, data, folder, **options):
    model = new_model(student)
    DistillCallback(teacher, **options).register(model)
    return results(train(model, data, folder, batch=2, val=False))


def text_of(caplog):
    return '\n'.join(r.getMessage() for r in caplog.records)


# ------------------------------------------------------------------ an mmdet detector teaches
def test_mmdet_teaches_yolo(data, yolox_teacher, tmp_path, caplog):
    found = distil('yolo11n.yaml', yolox_teacher, data(), tmp_path)
    assert all(0 < found[f'train/{k}'][0] < 1e4 for k in ('kdcls_loss', 'kdbox_loss'))
    text = text_of(caplog)
    assert '2 of 3 student classes taught by name (teacher knows 3)' in text and '84 positions, strides 8/16/32' in text
    assert re.search(r'input    mean \[0\.0(, 0\.0)*\] std \[1\.0(, 1\.0)*\] BGR', text) and 'BoxIoULoss' in text
    # Nothing of it is in what was saved.
    assert b'kd_plugins' not in (tmp_path / 'run' / 'weights' / 'last.pt').read_bytes()
    assert 'yolox' in (tmp_path / 'run' / 'kd.yaml').read_text().lower()


def test_mmdet_teacher_sees_its_own_pixels(data, yolox_teacher):
    """What the student's image would be after the teacher's own data preprocessor."""
    teacher, _ = build_source(find_source(yolox_teacher), ULTRALYTICS)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    call = teacher.outputs(pixels.flip(1).float() / 255, None, [teacher.head]).call(teacher.head)
    with torch.no_grad():
        batch = teacher.model.data_preprocessor(dict(inputs=list(pixels), data_samples=None), False)['inputs']
        expected = teacher.model(batch, None, mode='tensor')
    torch.testing.assert_close(call.output, expected, atol=1e-4, rtol=1e-4)
    predictions = read(teacher.model.bbox_head, call.output, training=call.training)
    assert predictions.strides == (8.0, 16.0, 32.0) and predictions.cls.shape == (2, 64 + 16 + 4, 3)


def test_mean_std_and_bgr_teacher(tmp_path):
    """Also for a preprocessor that normalises: RGB in [0, 1] to BGR pixels to mean and std, one affine."""
    given = synthetic.save_teacher(synthetic.resnet18('gfl/gfl_r50_fpn_1x_coco.py', 3), tmp_path, NAMES)
    teacher, _ = build_source(find_source(given), ULTRALYTICS)
    pixels = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = teacher._prepare(pixels.flip(1).float() / 255, None)
    expected = teacher.model.data_preprocessor(dict(inputs=list(pixels), data_samples=None), False)['inputs']
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


def test_callback_with_such_a_teacher_reaches_other_processes(yolox_teacher, timm_teacher):
    for teacher in (yolox_teacher, timm_teacher):
        callback = DistillCallback(teacher, cls=2.0)
        assert pickle.loads(pickle.dumps(callback)).options == callback.options
        assert callback.options.from_dict(callback.options.to_dict()) == callback.options


# ------------------------------------------------------------------ Ultralytics teaches mmdet
@pytest.mark.parametrize('teacher', ['yolo11n.yaml', 'yolov8n-p6.yaml', 'yolo26n.yaml'])
def test_yolo_teaches_mmdet(teacher, tmp_path):
    """By the hook alone; levels, classes and boxes are matched. A deeper pyramid pads by itself."""
    folder = synthetic.write_coco(tmp_path / 'data', ('blue', 'cat', 'red'))
    path = save_yolo(tmp_path / 'teacher.pt', teacher, NAMES)
    config = synthetic.short_run(
        synthetic.yolox(3), tmp_path / 'run', synthetic.dataloader(folder, ('blue', 'cat', 'red'))
    )
    config.default_hooks.distill = dict(
        type='kd_plugins.DistillHook', teacher=dict(ultralytics=path), terms=copy.deepcopy(TERMS)
    )
    config.default_hooks.checkpoint = None
    watch, runner = synthetic.train(config)
    distiller = next(h for h in runner.hooks if type(h).__name__ == 'DistillHook').session
    assert distiller.classes == {'': ([0, 2], [2, 0])}
    assert watch.steps == 2 and all(losses['loss_kd_cls'] > 0 for losses in watch.losses)
    assert all(losses['loss_kd_box'] > 0 for losses in watch.losses)
    # YOLOX is given BGR pixels; the teacher gets RGB in [0, 1].
    pixels = torch.rand(1, 3, 32, 32) * 255
    torch.testing.assert_close(distiller.teacher._prepare(pixels, None), pixels.flip(1) / 255)


def test_yolo_teaches_the_model_form(tmp_path):
    """With a trainable adapter between a neck and a layer of the YOLO."""
    folder = synthetic.write_coco(tmp_path / 'data', NAMES)
    path = save_yolo(tmp_path / 'teacher.pt', 'yolo11n.yaml', NAMES)
    config = synthetic.short_run(synthetic.yolox(3), tmp_path / 'run', synthetic.dataloader(folder, NAMES))
    terms = dict(TERMS, neck=dict(loss=dict(type='FeatureMSELoss'), student='neck[0]', teacher='model.16'))
    config.model = dict(
        config.model,
        type='kd_plugins.Distilled',
        student_type=config.model['type'],
        distill=dict(teacher=dict(ultralytics=path), terms=terms),
    )
    config.default_hooks.distill = dict(type='kd_plugins.DistillHook')
    config.default_hooks.checkpoint = None
    watch, runner = synthetic.train(config)
    assert all(losses[f'loss_kd_{k}'] > 0 for losses in watch.losses for k in terms)
    session = next(h for h in runner.hooks if type(h).__name__ == 'DistillHook').session
    assert session.bank.trainable() and any(name.startswith('kd_adapters') for name in watch.gradients)


def test_the_tool_takes_a_pt(tmp_path):
    """``tools/train.py --kd binary_kl --teacher x.pt``: the file is the whole teacher."""
    from kd_plugins.mm.cli import add_distillation

    folder = synthetic.write_coco(tmp_path / 'data', NAMES)
    path = save_yolo(tmp_path / 'teacher.pt', 'yolo11n.yaml', NAMES)
    config = synthetic.short_run(synthetic.yolox(3), tmp_path / 'run', synthetic.dataloader(folder, NAMES))
    add_distillation(config, 'binary_kl', path)
    config.default_hooks.checkpoint = None
    watch, _ = synthetic.train(config)
    assert all(losses['loss_kd_cls'] > 0 and losses['loss_kd_box'] > 0 for losses in watch.losses)


# ------------------------------------------------------------------ timm teaches
def test_timm_teaches_classify(data, timm_teacher, tmp_path, caplog):
    found = distil('yolo11n-cls.yaml', timm_teacher, data('classify'), tmp_path)
    assert found['train/kdcls_loss'][0] > 0
    text = text_of(caplog)
    assert 'timm resnet18' in text and 'resized to 224x224' in text and 'the same 3 classes' in text
    assert 'mean [123.67, 116.28, 103.53] std [58.4, 57.12, 57.38] RGB' in text


@pytest.mark.parametrize('size', [224, 64])
def test_timm_sees_its_own_normalisation_and_resolution(timm_teacher, size):
    teacher, _ = build_source(find_source(dict(timm_teacher, input_size=size)), ULTRALYTICS)
    from timm.data import resolve_data_config

    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits = teacher.outputs(image, None, [teacher.head]).call(teacher.head).output
    resized = image
    if size != 64:
        mode = resolve_data_config({}, model=teacher.model.net)['interpolation']
        resized = torch.nn.functional.interpolate(image, (size, size), mode=mode, antialias=True)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = teacher.model.net((resized - mean) / std)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope='module')
def other_classifiers(tmp_path_factory):
    """One network as a torchvision checkpoint and as a program that takes two images of 64x64, no more and no less."""
    torchvision = pytest.importorskip('torchvision')
    folder = tmp_path_factory.mktemp('torchvision')
    torch.manual_seed(0)
    net = torchvision.models.squeezenet1_1(num_classes=3).eval()
    torch.save(net.state_dict(), folder / 'net.pth')
    torch.export.save(torch.export.export(net, (torch.rand(2, 3, 64, 64),)), folder / 'net.pt2')
    return {
        'torchvision': dict(torchvision='squeezenet1_1', checkpoint=str(folder / 'net.pth'), classes=sorted(NAMES)),
        'exported': dict(exported=str(folder / 'net.pt2'), classes=sorted(NAMES)),
    }


@pytest.mark.parametrize(
    'kind, shown', [('torchvision', 'torchvision squeezenet1_1'), ('exported', 'resized to 64x64')]
)
def test_other_classifiers_teach_classify(data, other_classifiers, tmp_path, caplog, kind, shown):
    found = distil('yolo11n-cls.yaml', other_classifiers[kind], data('classify'), tmp_path)
    assert found['train/kdcls_loss'][0] > 0
    text = text_of(caplog)
    assert shown in text and 'the same 3 classes' in text


def test_a_yolo_classifier_for_others(tmp_path):
    """As the teacher of another framework's classifier: tapped and read like one of its own."""
    path = save_yolo(tmp_path / 'x.pt', 'yolo11n-cls.yaml', NAMES)
    teacher, _ = build_source(find_source(dict(ultralytics=path)), ULTRALYTICS)
    assert teacher.tap(Tap('logits')).module == teacher.head and teacher.num_classes == 3 and teacher.classes == NAMES
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    call = teacher.outputs(image, None, [teacher.head]).call(teacher.head)
    found = read(head_of(teacher.model), call.output, training=call.training, form=ClassPredictions)
    with torch.no_grad():
        probabilities, logits = teacher.model(image)
    assert found.activation == 'softmax'
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(found.logits.softmax(-1), probabilities)


def test_a_yolo_classifier_at_a_resolution_of_its_own(tmp_path):
    path = save_yolo(tmp_path / 'x.pt', 'yolo11n-cls.yaml', NAMES)
    teacher, _ = build_source(find_source(dict(ultralytics=path, input_size=96)), ULTRALYTICS)
    assert teacher.normalization.endswith('resized to 96x96')
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = teacher.outputs(image, None, [teacher.head]).call(teacher.head).output[1]
    resized = interpolate(image, (96, 96), mode='bilinear', align_corners=False, antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(found, teacher.model(resized)[1])
        assert (found - teacher.model(image)[1]).abs().max() > 1e-6
    for given, message in (
        (dict(ultralytics=path, input_size='large'), "teacher.input_size must be a whole number .*, got 'large'"),
        (
            dict(ultralytics=save_yolo(tmp_path / 'y.pt', 'yolo11n.yaml', NAMES), input_size=96),
            r'input_size=\(96, 96\) is for classifiers',
        ),
    ):
        with pytest.raises(DistillError, match=message):
            build_source(find_source(given), ULTRALYTICS)


# ------------------------------------------------------------------ masks
def test_segment_masks(data, tmp_path, caplog):
    path = save_yolo(tmp_path / 'teacher.pt', 'yolo11n-seg.yaml', NAMES)
    found = distil('yolo26n-seg.yaml', path, data('segment'), tmp_path, mask=2.0, mask_topk=16)
    assert 0 < found['train/kdmsk_loss'][0] < 100 and 'MaskKLDivLoss' in text_of(caplog)


# ------------------------------------------------------------------ refused
def test_refused_before_training(data, yolox_teacher, timm_teacher, tmp_path):
    path = save_yolo(tmp_path / 'teacher.pt', 'yolo11n.yaml', NAMES)
    for teacher, message in (
        (dict(yolox_teacher, chekpoint='x'), "no option 'chekpoint': did you mean 'checkpoint'"),
        (dict(config=yolox_teacher['config']), "needs 'checkpoint'"),
        (dict(yolox_teacher, checkpoint='none.pth'), "'none.pth' does not exist"),
        (dict(yolox_teacher, config='mmdet::yolox/yolox_tyni.py'), 'does not exist; '),
        (dict(yolox_teacher, timm='resnet18'), "got both 'config' and 'timm'"),
        (dict(checkpoint='x.pth'), "'x.pth' does not exist"),
        (dict(model='x', checkpoint='x.pth'), r"must be one of dict\(config=.*got the keys \['checkpoint', 'model'\]"),
        (dict(timm_teacher, timm='resnet81'), "no model 'resnet81'; did you mean"),
        (dict(timm='resnet18'), "needs 'checkpoint'.*pretrained=True"),
        (dict(timm_teacher, pretrained=True), 'not both'),
        (dict(timm_teacher, input_size=0), 'input_size must be a whole number'),
        (dict(ultralytics=path, clases=list(NAMES)), "no option 'clases': did you mean 'classes'"),
        (dict(ultralytics='none.pt'), 'does not exist'),
        ({}, 'must be one of'),
    ):
        with pytest.raises(DistillError, match=message):
            DistillCallback(teacher)
    assert DistillCallback(dict(ultralytics=path)).options.teacher == path
    beside = dict(ultralytics=path, classes=list(NAMES))
    assert DistillCallback(beside).options.teacher == beside


@pytest.mark.parametrize(
    'student, task, teacher, options, message',
    [
        ('yolo11n.yaml', 'detect', 'timm', {}, 'student is a detector and the teacher a classifier'),
        ('yolo11n-cls.yaml', 'classify', 'yolox', {}, 'student is a classifier and the teacher a detector'),
        ('yolo11n-seg.yaml', 'segment', 'yolox', dict(mask=1.0), 'student and teacher must both predict masks'),
    ],
)
def test_refused_when_training_starts(
    data, yolox_teacher, timm_teacher, tmp_path, student, task, teacher, options, message
):
    given = {'yolox': yolox_teacher, 'timm': dict(timm_teacher, classes=NAMES)}[teacher]
    with pytest.raises(DistillError, match=message):
        distil(student, given, data(task), tmp_path, **options)


def test_a_neck_of_mmdet_teaches(data, yolox_teacher, tmp_path):
    """By stride, through adapters."""
    found = distil('yolo11n.yaml', yolox_teacher, data('detect'), tmp_path, cls=0, box=0, feature=1.0)
    assert found['train/kdfea_loss'][0] > 0


def test_a_checkpoint_of_another_timm_model(timm_teacher):
    with pytest.raises(DistillError, match=r'does not fit ResNet.*teacher\.timm'):
        build_source(dict(timm_teacher, timm='resnet50'), ULTRALYTICS)


def test_a_classifier_cannot_teach_mmdet(timm_teacher, tmp_path):
    from kd_plugins.mm.host import MMHost
    from kd_plugins.teachers import PixelFormat
    from kd_plugins.teachers.run import RunOptions, load_teachers, open_session

    student = synthetic.build(synthetic.yolox(3))
    host = MMHost(student)
    of_yolo = dict(ultralytics=save_yolo(tmp_path / 'x.pt', 'yolo11n-cls.yaml', NAMES))
    for teacher in (timm_teacher, of_yolo):
        term = dict(loss=dict(type='BinaryKLDivLoss'), student='head', teacher='head')
        options = RunOptions.read(dict(teacher=teacher, terms=dict(cls=term)))
        teachers, _ = load_teachers(options.teachers, student, host, PixelFormat())
        with pytest.raises(DistillError, match='a classification head, but this loss compares detection heads'):
            open_session(student, teachers, options, host).check_heads()


def test_frameworks_do_not_import_each_other():
    """Not even when the other's teacher is known by name."""
    for module, others in (
        (
            'kd_plugins.yolo',
            ('kd_plugins.mm', 'kd_plugins.teachers.from_timm', 'mmengine', 'mmdet', 'timm', 'ultralytics'),
        ),
        ('kd_plugins.mm', ('kd_plugins.yolo', 'kd_plugins.teachers.from_timm', 'ultralytics', 'timm')),
    ):
        code = f'import sys, {module}\nfound = set({others!r}) & set(sys.modules)\nassert not found, found'
        subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize(
    'package, teacher', [('mmengine', dict(config='mmdet::x', checkpoint='x.pth')), ('timm', dict(timm='x'))]
)
def test_missing_framework_is_named(package, teacher):
    code = (
        f'import sys\nsys.modules[{package!r}] = None\nfrom kd_plugins.teachers import find_source\n'
        f'try:\n    find_source({teacher!r})\nexcept ValueError as error:\n    print(error)'
    )
    text = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout
    assert f'needs {package!r}, which is not installed; ' in text
