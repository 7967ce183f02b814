"""Readers against each head's own decoding, for every family."""

import copy

import pytest
import torch

import kd_plugins.yolo  # noqa: F401  registers the readers
from kd_plugins.errors import DistillError
from kd_plugins.predictions import read
from kd_plugins.yolo.heads import ROTATED as CODING
from kd_plugins.yolo.heads import head_of, is_classifier, refuse_unsupported, select_branch

UPRIGHT = [
    'yolov5n.yaml',
    'yolov5n-p6.yaml',
    'yolov8n.yaml',
    'yolov8n-p2.yaml',
    'yolov8n-p6.yaml',
    'yolov9t.yaml',
    'yolov10n.yaml',
    'yolo11n.yaml',
    'yolo12n.yaml',
    'yolo26n.yaml',
    'yolo26n-p2.yaml',
    'yolo26n-p6.yaml',
    'yolov8n-seg.yaml',
    'yolo26n-seg.yaml',
    'yolo11n-pose.yaml',
    'yolo26n-pose.yaml',
]
ROTATED = ['yolo11n-obb.yaml', 'yolo26n-obb.yaml']
STRIDES = {'p2': (4, 8, 16, 32), 'p6': (8, 16, 32, 64)}


@pytest.fixture
def image():
    return torch.rand(2, 3, 128, 192, generator=torch.Generator().manual_seed(0))


def raw_and_decoded(model, image):
    """What the head returns in training, and its own decoded output in evaluation, on the one-to-many branch."""
    model = copy.deepcopy(model)
    head = head_of(model)
    if hasattr(head, 'one2one_cv2'):
        head.end2end = False
    with torch.no_grad():
        decoded = model(image)
        while not torch.is_tensor(decoded):
            decoded = decoded[0]
        head.training = True
        return model(image), decoded


@pytest.mark.parametrize('cfg', UPRIGHT)
def test_upright_boxes_and_scores_are_those_of_the_head(build, image, cfg):
    model = build(cfg)
    raw, decoded = raw_and_decoded(model, image)
    found = read(head_of(model), raw, training=True)
    assert found.strides == STRIDES.get(cfg[:-5].rpartition('-')[2], (8, 16, 32))
    assert found.level_sizes == tuple((128 // s, 192 // s) for s in map(int, found.strides))
    xywh, scores = decoded[:, :4].transpose(1, 2), decoded[:, 4 : 4 + found.num_classes].transpose(1, 2)
    xyxy = torch.cat([xywh[..., :2] - xywh[..., 2:] / 2, xywh[..., :2] + xywh[..., 2:] / 2], -1)
    torch.testing.assert_close(found.boxes(), xyxy, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(found.class_probabilities(), scores)
    assert found.obj is None and 'no objectness' in found.absent['obj'] and found.box_coding is None
    assert found.besides == (('keypoints',) if 'pose' in cfg else ())
    if '26' in cfg:
        assert found.dist is None and 'reg_max=1' in found.absent['dist']
    else:
        assert found.dist.shape[-2:] == (4, 16)


@pytest.mark.parametrize('cfg', ROTATED)
def test_rotated_boxes_are_those_of_the_head(build, image, cfg):
    model = build(cfg)
    raw, decoded = raw_and_decoded(model, image)
    found = read(head_of(model), raw, training=True)
    assert found.ltrb is None and found.box_coding == CODING and found.besides == ('angles',)
    angle = select_branch(raw)['angle'].transpose(1, 2)
    near, far = found.box[..., :2] * found.stride_of, found.box[..., 2:] * found.stride_of
    x, y = ((far - near) / 2).split(1, -1)
    centre = torch.cat([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1) + found.points
    torch.testing.assert_close(
        torch.cat([centre, near + far], -1), decoded[:, :4].transpose(1, 2), atol=1e-3, rtol=1e-5
    )


@pytest.mark.parametrize('cfg', ['yolo11n.yaml', 'yolo26n.yaml', 'yolo26n-seg.yaml'])
def test_evaluation_and_training_outputs_read_the_same(build, image, cfg):
    model = copy.deepcopy(build(cfg))
    head = head_of(model)
    with torch.no_grad():
        evaluated = model(image)
        head.training = True
        trained = model(image)
    first, second = (read(head, out, training=False) for out in (evaluated, trained))
    torch.testing.assert_close(first.cls, second.cls)
    torch.testing.assert_close(first.boxes(), second.boxes())


def test_reading_keeps_the_gradient(build, image):
    model = copy.deepcopy(build('yolo11n.yaml')).train()
    found = read(head_of(model), model(image), training=True)
    (found.cls.sum() + found.ltrb.sum()).backward()
    assert all(p.grad is not None for k, p in model.named_parameters() if not k.endswith('dfl.conv.weight'))


def test_half_precision_is_read_in_float32(build, image):
    head = head_of(build('yolo11n.yaml'))
    raw, _ = raw_and_decoded(build('yolo11n.yaml'), image)
    half = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in raw.items()}
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = read(head, half, training=True)
    assert found.cls.dtype == found.ltrb.dtype == torch.float32
    exact = (half['boxes'].float().transpose(1, 2).unflatten(2, (4, 16)).softmax(-1) * torch.arange(16.0)).sum(-1)
    torch.testing.assert_close(found.ltrb, exact, atol=1e-4, rtol=1e-4)


def test_branches_are_chosen_by_name(build, image):
    raw, _ = raw_and_decoded(build('yolo26n.yaml'), image)
    assert select_branch(raw) is raw['one2many'] and select_branch(raw, 'one2one') is raw['one2one']
    # A fused model has lost one of them.
    assert select_branch({'one2many': {}, 'one2one': raw['one2one']}) is raw['one2one']
    plain = raw['one2many']
    assert select_branch(plain, 'one2one') is plain
    with pytest.raises(DistillError, match='both of its branches'):
        select_branch({'one2many': {}, 'one2one': {}})


@pytest.mark.parametrize('outputs', [torch.zeros(1), (), {'logits': 1}, [{'boxes': 1}]])
def test_unknown_structure_is_refused(build, outputs):
    with pytest.raises(DistillError, match=r'not understood: install ultralytics>=8.4.140'):
        read(head_of(build('yolo11n.yaml')), outputs, training=True)


def test_outputs_that_do_not_fit_the_head_are_refused(build, image):
    raw, _ = raw_and_decoded(build('yolo11n.yaml'), image)
    with pytest.raises(DistillError, match='does not fit reg_max=1'):
        read(head_of(build('yolo26n.yaml')), raw, training=True)


def test_kinds(build):
    for cfg, expected in (('yolo26n.yaml', False), ('yolo11n-cls.yaml', True), ('yolo26n-seg.yaml', False)):
        refuse_unsupported(build(cfg), 'student')
        assert is_classifier(build(cfg)) == expected


class Elsewhere(torch.nn.Module):
    """A model whose last layer has a name of its own."""

    def __init__(self, name):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Identity(), type(name, (torch.nn.Module,), {})())


@pytest.mark.parametrize('name', ['RTDETRDecoder', 'WorldDetect', 'YOLOEDetect', 'SemanticSegment', 'Depth', 'MyHead'])
def test_other_heads_are_refused_and_the_supported_named(name):
    with pytest.raises(DistillError, match=rf'teacher has the head {name}.*detect, segment, pose and obb.*not RT-DETR'):
        refuse_unsupported(Elsewhere(name), 'teacher')


@pytest.mark.parametrize('cfg', ['yolov8n-world.yaml', 'yoloe-11n.yaml', 'rtdetr-l.yaml'])
def test_real_unsupported_models_are_refused(cfg):
    from ultralytics.nn import tasks

    kind = {'yolov8n-world.yaml': 'WorldModel', 'yoloe-11n.yaml': 'YOLOEModel', 'rtdetr-l.yaml': 'RTDETRDetectionModel'}
    model = getattr(tasks, kind[cfg])(tasks.yaml_model_load(cfg), verbose=False)
    with pytest.raises(DistillError, match='cannot be distilled; supported are'):
        refuse_unsupported(model, 'student')


def test_not_a_model():
    with pytest.raises(DistillError, match='Linear is not an Ultralytics model'):
        head_of(torch.nn.Linear(1, 1))
