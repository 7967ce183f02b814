"""A user's files of tests/unit/extending in real runs of both zoos, named by the option ``imports``."""

import importlib

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from kd_plugins.errors import DistillError
from tests.integration.cls_lab import LOGITS
from tests.integration.lab import Probe

STEPS = 2
DEPTH = """
default_scope = 'mmseg'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
model = dict(
    type='DepthEstimator',
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True, pad_val=0,
                           seg_pad_val=0, size=(64, 64)),
    backbone=dict(type='ResNet', depth=18, base_channels={width}, stem_channels={width}),
    decode_head=dict(type='VPDDepthHead', in_channels=[{width}, {width} * 2, {width} * 4, {width} * 8], embed_dim=2,
                     feature_dim=16, num_deconv_layers=1, num_deconv_filters=(8,)),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True), dataset=dict(
    type='NYUDataset', data_root='{root}', img_suffix='.png',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadDepthAnnotation', depth_rescale_factor=1e-3),
              dict(type='PackSegInputs')]))
train_cfg = dict(type='IterBasedTrainLoop', max_iters={steps}, val_interval=100)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
work_dir = '{root}/run'
experiment_name = 'depth'
randomness = dict(seed=0)
"""


@pytest.fixture
def depth(tmp_path):
    """``depth(width)``: the file of a small depth estimator's config, with mmseg's data set of scenes."""
    rng = np.random.default_rng(0)
    for folder in ('images', 'annotations'):
        (tmp_path / folder).mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f'images/kitchen_{i}.png')
        far = rng.integers(500, 9000, (64, 64)).astype(np.uint16)
        cv2.imwrite(str(tmp_path / f'annotations/kitchen_{i}.png'), far)

    def write(width):
        path = tmp_path / f'depth_{width}.py'
        path.write_text(DEPTH.format(root=tmp_path.as_posix(), width=width, steps=STEPS))
        return str(path)

    return write


def test_a_form_and_a_schedule_in_mmseg(lab, depth, own_files, tmp_path, monkeypatch):
    """mmseg's depth estimators, which none of ours covers: reader, loss and form come from one file of the user's."""
    teacher = dict(config=depth(32), checkpoint=str(tmp_path / 'teacher.pth'))
    big = lab.build(Config.fromfile(teacher['config']), seed=7)
    torch.save(dict(state_dict=big.state_dict()), teacher['checkpoint'])
    loss = importlib.import_module(own_files['form']).ScaleInvariantLoss
    values, forward = [], loss.forward

    def watched(self, student, teacher):
        gap = (student.metres.log() - teacher.metres.log()).flatten(1)
        values.append((gap.square().mean(1) - 0.5 * gap.mean(1).square()).mean().item())
        return forward(self, student, teacher)

    monkeypatch.setattr(loss, 'forward', watched)
    weight = dict(type='halving', start=4.0, times=2)
    term = dict(loss=dict(type='ScaleInvariantLoss'), student='decode_head', teacher='decode_head', weight=weight)
    imports = [own_files['form'], own_files['schedule']]
    probe = Probe()
    runner = lab.runner(lab.hook_form(Config.fromfile(depth(16)), teacher, dict(mine=term), imports=imports), probe)
    before = runner.model.decode_head.depth_pred_layer[-1].weight.clone()
    runner.train()
    # The first value is that of the check. Scenes have 27 classes and depth has none: nothing of it is matched.
    expected = [w * v for w, v in zip((4.0, 2.0), values[1:], strict=True)]
    assert [log['loss_kd_mine'] for log in probe.logs] == pytest.approx(expected, rel=1e-4) and min(expected) > 0
    assert not torch.equal(before, runner.model.decode_head.depth_pred_layer[-1].weight)


def test_a_loss_and_a_weighting_in_a_classifier(cls_lab, own_files):
    terms = dict(
        mine=dict(loss=dict(type='LogCoshLoss'), student='stages[-1]', teacher='stages[-1]'),
        sure=dict(LOGITS, samples='certainty'),
        all=LOGITS,
    )
    probe = Probe()
    imports = [own_files['loss'], own_files['weighting']]
    cls_lab.train(cls_lab.hook_form(cls_lab.plain(), cls_lab.teacher(), terms, imports=imports), probe)
    assert len(probe.logs) == 4
    for log in probe.logs:
        # All weights lie below 1.
        assert log['loss_kd_mine'] > 0 and 0 < log['loss_kd_sure'] < log['loss_kd_all']


def test_near_misses_before_the_teacher_is_loaded(cls_lab, own_files):
    term = dict(loss=dict(type='LogCosLoss'), student='stages[-1]', teacher='stages[-1]')
    config = cls_lab.hook_form(cls_lab.plain(), cls_lab.teacher(), dict(mine=term), imports=[own_files['loss']])
    with pytest.raises(DistillError, match=r"there is no loss 'LogCosLoss'; .*'LogCoshLoss'"):
        cls_lab.train(config)
