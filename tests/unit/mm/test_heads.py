"""Every reader against the real mmdet head: decoding what was read gives the head's own boxes and scores."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip('mmdet')

import mmdet.models  # noqa: F401
from mmdet.registry import MODELS
from mmengine.config import ConfigDict

import kd_plugins.mm.heads
from kd_plugins.errors import DistillError
from kd_plugins.predictions import align, find_reader, read, supported_heads

CLASSES, CHANNELS, BATCH, IMAGE = 3, 8, 2, (64, 96)
FINE, COARSE = (8, 16, 32), (8, 16, 32, 64, 128)
GN = {'type': 'GN', 'num_groups': 2}
SIGMOID = {'type': 'CrossEntropyLoss', 'use_sigmoid': True}
SOFTMAX = {'type': 'CrossEntropyLoss', 'use_sigmoid': False}
FOCAL = {'type': 'FocalLoss', 'use_sigmoid': True}
QUALITY = {'type': 'QualityFocalLoss', 'use_sigmoid': True}
POINTS = {'type': 'MlvlPointGenerator', 'offset': 0, 'strides': FINE}
DISTANCES = {'type': 'DistancePointBBoxCoder'}
ONE_ANCHOR = {'type': 'AnchorGenerator', 'ratios': [1.0], 'octave_base_scale': 8, 'scales_per_octave': 1}
NINE = {**ONE_ANCHOR, 'ratios': [0.5, 1.0, 2.0], 'octave_base_scale': 4, 'scales_per_octave': 3, 'strides': COARSE}
DELTAS = {'type': 'DeltaXYWHBBoxCoder', 'target_means': [0.0] * 4, 'target_stds': [0.1, 0.1, 0.2, 0.2]}

COMMON = {'num_classes': CLASSES, 'in_channels': CHANNELS, 'feat_channels': CHANNELS, 'stacked_convs': 1}
RTMDET = {**COMMON, 'anchor_generator': POINTS, 'bbox_coder': DISTANCES, 'loss_cls': QUALITY, 'norm_cfg': GN}
GFL = {
    **COMMON,
    'type': 'GFLHead',
    'anchor_generator': {**ONE_ANCHOR, 'strides': COARSE},
    'loss_cls': QUALITY,
    'reg_max': 7,
    'norm_cfg': GN,
}
ATSS = {
    **COMMON,
    'type': 'ATSSHead',
    'anchor_generator': {**ONE_ANCHOR, 'strides': COARSE},
    'bbox_coder': DELTAS,
    'loss_cls': FOCAL,
    'norm_cfg': GN,
}
TOOD = {
    **COMMON,
    'type': 'TOODHead',
    'stacked_convs': 2,
    'feat_channels': 24,  # its layer attention divides the stacked channels by 48
    'in_channels': 24,
    'anchor_generator': {**ONE_ANCHOR, 'strides': FINE},
    'bbox_coder': DELTAS,
    'norm_cfg': GN,
    'loss_cls': {'type': 'QualityFocalLoss', 'use_sigmoid': True, 'activated': True},
}
RETINA = {**COMMON, 'type': 'RetinaHead', 'loss_cls': FOCAL, 'bbox_coder': DELTAS}
FCOS = {**COMMON, 'type': 'FCOSHead', 'strides': COARSE, 'norm_cfg': GN}
YOLOV3 = {
    'type': 'YOLOV3Head',
    'num_classes': CLASSES,
    'in_channels': [CHANNELS] * 3,
    'out_channels': [CHANNELS] * 3,
    'norm_cfg': GN,
}

HEADS = {
    'yolox': {**COMMON, 'type': 'YOLOXHead', 'strides': FINE, 'norm_cfg': GN},
    'yolov3': YOLOV3,
    'rtmdet': {**RTMDET, 'type': 'RTMDetHead', 'with_objectness': False},
    'rtmdet with objectness': {**RTMDET, 'type': 'RTMDetHead', 'with_objectness': True},
    'rtmdet sepbn': {**RTMDET, 'type': 'RTMDetSepBNHead', 'with_objectness': False},
    'rtmdet sepbn exp': {**RTMDET, 'type': 'RTMDetSepBNHead', 'exp_on_reg': True, 'share_conv': False},
    'gfl': GFL,
    'atss': ATSS,
    'atss softmax': {**ATSS, 'loss_cls': SOFTMAX},
    'atss moved centres': {**ATSS, 'anchor_generator': {**ONE_ANCHOR, 'strides': FINE, 'center_offset': 0.5}},
    'retina': RETINA,
    'retina softmax': {**RETINA, 'loss_cls': SOFTMAX},
    'retina tblr': {**RETINA, 'bbox_coder': {'type': 'TBLRBBoxCoder', 'normalizer': 4.0}},
    'retina sepbn': {**RETINA, 'type': 'RetinaSepBNHead', 'num_ins': 5, 'norm_cfg': GN, 'anchor_generator': NINE},
    'fcos': FCOS,
    'fcos normalised': {**FCOS, 'norm_on_bbox': True, 'centerness_on_reg': True},
    'fcos softmax': {**FCOS, 'loss_cls': SOFTMAX},
    'tood': TOOD,
    'tood anchor based': {**TOOD, 'anchor_type': 'anchor_based'},
    'nasfcos': {**FCOS, 'type': 'NASFCOSHead'},
    # Its default loss_ld has no registered type.
    'ld': {**GFL, 'type': 'LDHead', 'loss_ld': {'type': 'KnowledgeDistillationKLDivLoss', 'T': 10}},
    'pisa retina': {**RETINA, 'type': 'PISARetinaHead'},
    'free anchor': {**COMMON, 'type': 'FreeAnchorRetinaHead', 'bbox_coder': DELTAS},
}


def build(name_or_cfg, seed=0, **changes):
    """A real head with weights large enough that scores and boxes vary, moderate enough that nothing saturates."""
    cfg = HEADS[name_or_cfg] if isinstance(name_or_cfg, str) else name_or_cfg
    head = MODELS.build({**copy.deepcopy(cfg), 'test_cfg': {}, **changes})
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        noise = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
        parameter.data = noise if parameter.dim() else torch.rand((), generator=generator) + 0.5
    return head


def features(head, seed=0, **kwargs):
    """One map per level, from the strides of the head, for an image of ``IMAGE`` pixels."""
    channels = head.in_channels if isinstance(head.in_channels, int) else head.in_channels[0]
    generator = torch.Generator().manual_seed(seed)
    sizes = [[math.ceil(side / s[0]) for side in IMAGE] for s in head.prior_generator.strides]
    return [torch.randn(BATCH, channels, *size, generator=generator).to(**kwargs) for size in sizes]


def own_results(head, outputs):
    """Boxes, scores and labels that the head itself decodes, without NMS, thresholds and clipping."""
    if hasattr(head, 'bbox_coder'):
        head.bbox_coder.clip_border = False
    outputs = [[level.detach().clone() for level in maps] for maps in outputs]  # YOLOv3 writes into them
    metas = [{'img_shape': IMAGE, 'scale_factor': (1.0, 1.0)}] * BATCH
    cfg = ConfigDict(score_thr=-1, nms_pre=10**6)
    return head.predict_by_feat(*outputs, batch_img_metas=metas, cfg=cfg, rescale=False, with_nms=False)


def rows(boxes, scores, labels):
    """``(N, 6)`` box / 100, score, label, so that one tolerance fits all columns."""
    return torch.cat([boxes / 100, scores[:, None], labels[:, None].to(boxes)], 1)


def assert_same_detections(head, predictions, results):
    boxes = predictions.boxes().detach()
    scores = predictions.class_probabilities().detach()
    if predictions.obj is not None:
        scores = scores * predictions.obj.detach().sigmoid()
    assert scores.std(1).amin() > 1e-3, 'scores do not vary: the comparison would prove nothing'
    for b, result in enumerate(results):
        theirs = rows(result.bboxes, result.scores, result.labels)
        if type(head).__name__ == 'YOLOXHead':  # keeps the best class of each position, in order
            best, labels = scores[b].max(-1)
            torch.testing.assert_close(rows(boxes[b], best, labels), theirs, rtol=1e-4, atol=1e-5)
            continue
        labels = torch.arange(scores.shape[-1]).expand(scores.shape[1:])
        pairs = boxes[b][:, None].expand(-1, scores.shape[-1], 4)
        ours = rows(pairs.reshape(-1, 4), scores[b].flatten(), labels.flatten())
        assert ours.shape == theirs.shape
        gap = torch.cdist(ours, theirs, compute_mode='donot_use_mm_for_euclid_dist')
        limit = 1e-4 * (1 + ours.norm(dim=1))
        assert (gap.amin(1) < limit).all() and (gap.amin(0) < limit).all()


@pytest.mark.parametrize('name', HEADS)
def test_decodes_to_the_heads_own_detections(name):
    """In the evaluation form, and in the training form: GroupNorm makes both predict the same."""
    head = build(name)
    head.eval()
    outputs = head(features(head))
    predictions = read(head, outputs, training=False)
    results = own_results(head, outputs)
    assert predictions.num_classes == CLASSES
    assert list(predictions.strides) == sorted(predictions.strides)
    assert_same_detections(head, predictions, results)
    head.train()
    assert_same_detections(head, read(head, head(features(head))), results)


@pytest.mark.parametrize('name', HEADS)
def test_gradients_reach_the_head(name):
    head = build(name).train()
    p = read(head, head(features(head)))
    assert all(v.dtype == torch.float32 for v in (p.cls, p.ltrb, p.points))
    for tensor in (p.cls, p.ltrb, p.obj, p.dist, p.box):
        if tensor is not None:
            head.zero_grad()
            tensor.square().mean().backward(retain_graph=True)
            grads = [q.grad for q in head.parameters() if q.grad is not None]
            assert grads and all(g.isfinite().all() for g in grads) and any(g.ne(0).any() for g in grads)


@pytest.mark.parametrize('name', HEADS)
def test_bfloat16_outputs_are_decoded_in_float32(name):
    """Boxes are as exact as the bf16 outputs allow, also when the caller is inside autocast."""
    head = build(name).eval()
    outputs = [[m.detach().bfloat16() for m in maps] for maps in head(features(head))]
    exact = read(head, [[m.float() for m in maps] for maps in outputs], training=False)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        p = read(head, outputs, training=False)
    for field in ('cls', 'obj', 'ltrb', 'dist', 'box'):
        if getattr(exact, field) is not None:
            assert getattr(p, field).dtype == torch.float32
            torch.testing.assert_close(getattr(p, field), getattr(exact, field))


@pytest.mark.parametrize(
    'name',
    # A minute for all of them: each compiles a reader.
    [
        'yolox',
        'gfl',
        *(pytest.param(n, marks=pytest.mark.long) for n in ('yolov3', 'rtmdet', 'retina', 'fcos', 'tood')),
    ],
)
def test_compiles(name):
    head = build(name).eval()
    outputs = [[m.detach() for m in maps] for maps in head(features(head))]
    reader = find_reader(head)

    def decode(outputs):
        p = reader(head, outputs, training=False)
        return p.boxes(), p.confidence()

    for eager, compiled in zip(decode(outputs), torch.compile(decode, backend='eager')(outputs), strict=True):
        torch.testing.assert_close(compiled, eager)


def test_which_fields_a_head_has():
    fields = {}
    for name in ('yolox', 'yolov3', 'rtmdet', 'gfl', 'atss', 'retina', 'fcos', 'tood'):
        head = build(name).eval()
        p = read(head, head(features(head)))
        has = [f for f in ('obj', 'box', 'dist') if getattr(p, f) is not None]
        fields[name] = (p.activation, p.num_priors, p.obj_coding if p.obj is not None else None, has)
    assert fields == {
        'yolox': ('sigmoid', 1, 'objectness', ['obj', 'box']),
        'yolov3': ('sigmoid', 3, 'objectness', ['obj', 'box']),
        'rtmdet': ('sigmoid', 1, None, []),
        'gfl': ('sigmoid', 1, None, ['dist']),
        'atss': ('sigmoid', 1, 'centerness', ['obj', 'box']),
        'retina': ('sigmoid', 9, None, ['box']),
        'fcos': ('sigmoid', 1, 'centerness', ['obj']),
        'tood': ('probability', 1, None, []),
    }


def test_yolov3_levels_are_brought_to_ascending_stride():
    head = build('yolov3').eval()
    (maps,) = outputs = head(features(head))
    p = read(head, outputs)
    assert p.strides == (8.0, 16.0, 32.0) and p.level_sizes == ((8, 12), (4, 6), (2, 3))
    finest = maps[2]
    assert torch.equal(p.cls[0, 0], finest[0, 5 : 5 + CLASSES, 0, 0])
    # Second prior of the cell in row 1, column 2.
    assert torch.equal(p.obj[1, 3 * (12 + 2) + 1, 0], finest[1, (5 + CLASSES) + 4, 1, 2])


def coding(name, **changes):
    head = build(name, **changes).eval()
    return read(head, head(features(head))).box_coding


def test_equal_coding_means_comparable_numbers():
    assert coding('yolox') == coding('yolox', seed=1) == 'yolox'
    assert coding('retina') == coding('retina softmax') == coding('retina sepbn')
    others = [
        coding('yolov3'),
        coding('retina'),
        coding('retina tblr'),
        coding('atss'),
        coding('atss moved centres'),
        coding('retina', bbox_coder={'type': 'DeltaXYWHBBoxCoder'}),
        coding('retina', anchor_generator={'type': 'AnchorGenerator', 'ratios': [1.0], 'scales': [4], 'strides': FINE}),
    ]
    assert len({*others, 'yolox'}) == len(others) + 1
    assert coding('atss') == coding('atss', anchor_generator={**ONE_ANCHOR, 'strides': FINE})


REFUSED = {
    'VFNetHead': {**COMMON, 'norm_cfg': GN},
    'PAAHead': {k: v for k, v in ATSS.items() if k != 'type'},
    'LADHead': {k: v for k, v in ATSS.items() if k != 'type'},
    'DDODHead': {k: v for k, v in ATSS.items() if k != 'type'},
    'FSAFHead': {
        **COMMON,
        'reg_decoded_bbox': True,
        'anchor_generator': {**ONE_ANCHOR, 'octave_base_scale': 1, 'strides': COARSE},
        'bbox_coder': {'type': 'TBLRBBoxCoder', 'normalizer': 4.0},
        'loss_cls': FOCAL,
    },
    'AutoAssignHead': {k: v for k, v in FCOS.items() if k != 'type'},
}


@pytest.mark.parametrize('name', REFUSED)
def test_heads_that_only_inherit_are_refused(name):
    head = MODELS.build({'type': name, **copy.deepcopy(REFUSED[name])})
    with pytest.raises(DistillError, match=f'Predictions of {name} cannot be read') as error:
        find_reader(head)
    assert all(h in str(error.value) for h in supported_heads())


@pytest.mark.parametrize(
    'name',
    [
        'ATSSVLFusionHead',
        'CenterNetUpdateHead',
        'CondInstBboxHead',
        'DETRHead',
        'FoveaHead',
        'GARetinaHead',
        'RPNHead',
        'RTMDetInsHead',
        'RTMDetInsSepBNHead',
        'RepPointsHead',
        'SABLRetinaHead',
        'SSDHead',
        'YOLACTHead',
        'YOLOFHead',
    ],
)
def test_other_heads_are_refused(name):
    cls = MODELS.get(name)
    with pytest.raises(DistillError, match=f'Predictions of {name} cannot be read'):
        find_reader(cls.__new__(cls))  # the class decides; building each would add nothing


def test_users_subclass_with_another_loss_is_read():
    class MyHead(MODELS.get('YOLOXHead')):
        def loss_by_feat(self, *args, **kwargs):
            return {}

    assert find_reader(MyHead.__new__(MyHead)) is kd_plugins.mm.heads.read_yolox


def test_same_name_from_another_package_is_not_mmdets():
    from torch import nn

    class YOLOXHead(nn.Module):
        pass

    with pytest.raises(DistillError, match='YOLOXHead cannot be read'):
        find_reader(YOLOXHead())


@pytest.mark.parametrize(
    'name, changes, message',
    [
        ('rtmdet', {'anchor_generator': {**POINTS, 'strides': [(8, 16), (16, 32), (32, 64)]}}, 'non-square strides'),
        ('rtmdet', {'bbox_coder': DELTAS}, 'RTMDetHead with bbox_coder DeltaXYWHBBoxCoder'),
        ('retina', {'bbox_coder': DISTANCES}, 'RetinaHead with bbox_coder DistancePointBBoxCoder'),
        ('fcos', {'strides': (8, 8, 16, 32, 64)}, 'levels of equal stride'),
        (
            'retina',
            {
                'anchor_generator': {
                    'type': 'SSDAnchorGenerator',
                    'scale_major': False,
                    'min_sizes': [8, 16],
                    'max_sizes': [16, 32],
                    'strides': [8, 16],
                    'ratios': [[2], [2, 3]],
                }
            },
            'priors per location in different levels',
        ),
    ],
)
def test_settings_that_cannot_be_read(name, changes, message):
    head = build(name, **changes).eval()
    outputs = [[torch.zeros(1, 4, 2, 2)] * len(head.prior_generator.strides)] * 3
    with pytest.raises(DistillError, match=message):
        read(head, outputs if 'fcos' in name else outputs[:2])


def test_class_scores_with_their_own_activation_are_refused():
    head = build('retina').eval()
    head.loss_cls.custom_cls_channels = True
    with pytest.raises(DistillError, match='FocalLoss'):
        read(head, head(features(head)))


def test_gfl_teaches_yolox():
    """Five levels against three, points at the same places, boxes in pixels unchanged."""
    student, teacher = build('yolox').train(), build('gfl', seed=1).eval()
    s, t = align(read(student, student(features(student))), before := read(teacher, teacher(features(teacher))))
    assert s.strides == t.strides == (8.0, 16.0, 32.0)
    torch.testing.assert_close(t.boxes(), before.select_levels(s.strides).boxes())
    assert torch.equal(s.points, t.points) and t.dist is not None


def test_gfl_teaches_fcos_across_shifted_points():
    student, teacher = build('fcos').train(), build('gfl', seed=1).eval()
    s, t = align(read(student, student(features(student))), before := read(teacher, teacher(features(teacher))))
    torch.testing.assert_close(t.boxes(), before.boxes())
    assert torch.equal(s.points, t.points) and t.dist is None


def test_yolov3_teaches_yolox():
    student, teacher = build('yolox').train(), build('yolov3', seed=1).eval()
    s, t = align(read(student, student(features(student))), before := read(teacher, teacher(features(teacher))))
    assert t.num_priors == 1 and t.cls.shape == s.cls.shape and torch.equal(t.points, s.points)
    best = before.confidence().unflatten(1, (-1, 3)).argmax(-1, keepdim=True)
    boxes = before.boxes().unflatten(1, (-1, 3)).gather(2, best[..., None].expand(-1, -1, -1, 4)).squeeze(2)
    torch.testing.assert_close(t.boxes(), boxes)


def test_retinanet_teaches_yolox_on_common_strides():
    student, teacher = build('yolox').train(), build('retina softmax', seed=1).eval()
    s, t = align(read(student, student(features(student))), read(teacher, teacher(features(teacher))))
    assert t.strides == (8.0, 16.0, 32.0) and t.activation == 'sigmoid' and t.cls.shape == s.cls.shape


def test_the_readers_import_no_framework():
    path = kd_plugins.mm.heads.__file__
    code = f'import runpy, sys; runpy.run_path({path!r}); print({{"mmdet", "mmcv", "mmengine"}} & set(sys.modules))'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == 'set()'


@pytest.mark.parametrize('name', ['yolox', 'atss'])
def test_priors_are_made_once_per_size_and_survive_inference_mode(name):
    head = build(name)
    inputs = [torch.rand(1, CHANNELS, 32 >> i, 32 >> i) for i in range(len(head.prior_generator.strides))]
    with torch.inference_mode():
        first = read(head, head(inputs), training=True)
    again = read(head, head(inputs), training=True)
    assert again.points is first.points
    again.ltrb.sum().backward()
    smaller = read(head, head([x[..., : max(x.shape[-1] // 2, 1)] for x in inputs]), training=True)
    assert len(smaller.points) < len(first.points)
    other = build(name)
    assert torch.equal(read(other, other(inputs), training=True).points, first.points)
