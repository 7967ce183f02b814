"""mmrotate's dense heads: what is read of each is what the head itself scores and decodes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip('mmrotate')

import mmrotate.models  # noqa: F401
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmrotate.registry import MODELS

import kd_plugins.mm  # noqa: F401
from kd_plugins.errors import DistillError
from kd_plugins.predictions import align, read

CLASSES, CHANNELS, IMAGE = 3, 8, (64, 96)
SIZES = dict(num_classes=CLASSES, in_channels=CHANNELS, feat_channels=CHANNELS, stacked_convs=1)
FINE = (8, 16, 32)
GN = dict(type='GN', num_groups=2)
POINTS = dict(type='mmdet.MlvlPointGenerator', offset=0, strides=FINE)
ANCHORS = dict(type='FakeRotatedAnchorGenerator', angle_version='le90', octave_base_scale=4, strides=FINE)
ANCHORS.update(scales_per_octave=1, ratios=[1.0, 0.5])
DELTAS = dict(type='DeltaXYWHTRBBoxCoder', angle_version='le90', norm_factor=None, edge_swap=True, proj_xy=True)
RETINA = dict(SIZES, anchor_generator=ANCHORS, bbox_coder=DELTAS, loss_bbox=dict(type='mmdet.L1Loss'))
RETINA.update(loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True))
RTMDET = dict(SIZES, anchor_generator=POINTS, bbox_coder=dict(type='DistanceAnglePointCoder', angle_version='le90'))
RTMDET.update(loss_cls=dict(type='mmdet.QualityFocalLoss', use_sigmoid=True), norm_cfg=GN)
RTMDET.update(loss_bbox=dict(type='RotatedIoULoss', mode='linear'))
FCOS = dict(type='RotatedFCOSHead', **SIZES, strides=FINE, norm_cfg=GN)
FCOS.update(regress_ranges=((-1, 64), (64, 128), (128, 1e8)), bbox_coder=RTMDET['bbox_coder'])
HEADS = {
    'retina': dict(type='mmdet.RetinaHead', **RETINA),
    'rotated retina': dict(type='RotatedRetinaHead', **RETINA),
    'rtmdet': dict(type='RotatedRTMDetHead', **RTMDET, with_objectness=False),
    'fcos': FCOS,
    'fcos in strides': dict(FCOS, norm_on_bbox=True),
}


def build(config):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmrotate'):
        head = MODELS.build(ConfigDict({**config, 'test_cfg': dict(nms_pre=100_000, score_thr=0.0)})).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return head


def features():
    torch.manual_seed(1)
    return [torch.randn(2, CHANNELS, IMAGE[0] // s, IMAGE[1] // s) for s in FINE]


def read_of(head, training=False):
    head.train(training)
    with torch.no_grad():
        outputs = head(features())
    return outputs, read(head, outputs, training=training)


def boxes_of(head, outputs, found, index=0):
    """What the head's own coder makes of the sides that were read, with the angles that it predicted."""
    angles = [level[index] for level in outputs[2]]
    flat = torch.cat([a.flatten(1).T for a in angles])
    sides = found.box[index] * found.stride_of
    return head.bbox_coder.decode(found.points, torch.cat([sides, head.angle_coder.decode(flat, keepdim=True)], -1))


@pytest.mark.parametrize('config', HEADS.values(), ids=HEADS)
def test_classes_and_sides(config):
    head = build(config)
    outputs, found = read_of(head)
    assert found.num_classes == CLASSES and found.unread == ('angles',) and found.ltrb is None
    meta = dict(img_shape=IMAGE, scale_factor=(1.0, 1.0))
    own = head.predict_by_feat(*outputs, batch_img_metas=[meta] * 2, cfg=head.test_cfg, with_nms=False)[0]
    scores = found.cls[0].sigmoid() * (1 if found.obj is None else found.obj[0].sigmoid())
    torch.testing.assert_close(scores.flatten().sort().values, own.scores.sort().values)
    if 'Retina' in config['type']:
        priors = head.prior_generator.grid_priors([f.shape[-2:] for f in features()], device='cpu')
        anchors = torch.cat([level.tensor for level in priors])
        torch.testing.assert_close(found.points, anchors[:, :2])
        assert found.box.shape == (2, len(anchors), 4)
        raw = torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, 5) for level in outputs[1]], 1)
        torch.testing.assert_close(found.box, raw[..., :4])
    else:
        boxes = boxes_of(head, outputs, found)
        expected = own.bboxes.tensor
        assert len(expected) == boxes.shape[0] * CLASSES
        # The head repeats a box for each of its classes.
        torch.testing.assert_close(expected.sum(0), boxes.sum(0) * CLASSES, rtol=1e-3, atol=1e-2)


def test_the_unit_is_that_of_strides_in_training_too():
    head = build(dict(HEADS['fcos in strides']))
    torch.testing.assert_close(read_of(head, training=True)[1].box, read_of(head)[1].box)


def test_anchors_and_distances_are_no_pair():
    retina, fcos = (read_of(build(HEADS[name]))[1] for name in ('rotated retina', 'fcos'))
    assert retina.box_coding != fcos.box_coding
    same, _ = align(retina, retina)
    assert same.box is not None


def test_what_decodes_otherwise_is_refused_by_name():
    head = build(dict(FCOS, type='H2RBoxHead'))
    with pytest.raises(DistillError, match=r'Predictions of H2RBoxHead cannot be read.*--kd pkd'):
        read(head, None)
