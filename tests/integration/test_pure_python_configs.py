"""A config in MMEngine's pure-Python style: its types are classes and functions."""

import pytest
import torch
from mmengine.config import Config

from kd_plugins.mm import cli
from tests.integration.lab import CLASSES

BASE = """
from mmengine.config import read_base
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.models import GFL
from mmdet.models.backbones import ResNet
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import GFLHead
from mmdet.models.losses import DistributionFocalLoss, GIoULoss, QualityFocalLoss
from mmdet.models.necks import FPN
from mmdet.models.task_modules.assigners import ATSSAssigner
from mmdet.models.task_modules.prior_generators import AnchorGenerator
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import DefaultSampler, pseudo_collate
from mmengine.hooks import CheckpointHook, LoggerHook, RuntimeInfoHook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop
from torch.optim import SGD

default_scope = None
default_hooks = dict(
    info=dict(type=RuntimeInfoHook), checkpoint=dict(type=CheckpointHook), logger=dict(type=LoggerHook))
model = dict(
    type=GFL, data_preprocessor=dict(type=DetDataPreprocessor, mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32),
    backbone=dict(type=ResNet, depth=18, base_channels=8, stem_channels=8),
    neck=dict(type=FPN, in_channels=[8, 16, 32, 64], start_level=1, add_extra_convs='on_output', num_outs=5,
        out_channels=16),
    bbox_head=dict(type=GFLHead, num_classes=3, in_channels=16, stacked_convs=1, feat_channels=16, norm_cfg=None,
        anchor_generator=dict(type=AnchorGenerator, ratios=[1.0], octave_base_scale=8, scales_per_octave=1,
            strides=[8, 16, 32, 64, 128]),
        loss_cls=dict(type=QualityFocalLoss), loss_dfl=dict(type=DistributionFocalLoss), reg_max=16,
        loss_bbox=dict(type=GIoULoss)),
    train_cfg=dict(assigner=dict(type=ATSSAssigner, topk=9), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(nms_pre=10, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6), max_per_img=9))
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type=DefaultSampler), collate_fn=dict(type=pseudo_collate),
    dataset=dict(type=CocoDataset, data_root='{root}/', ann_file='annotations.json', data_prefix=dict(img='images/'),
        metainfo=dict(classes={names}), pipeline=[
            dict(type=LoadImageFromFile), dict(type=LoadAnnotations, with_bbox=True),
            dict(type=Resize, scale=(96, 96), keep_ratio=True), dict(type=PackDetInputs)]))
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.01))
"""
TEACHER = """
from mmengine.config import read_base
with read_base():
    from .plain import *
model.update(dict(neck=dict(out_channels=32), bbox_head=dict(in_channels=32, feat_channels=32)))
"""
DISTILL = """
from mmengine.config import read_base
with read_base():
    from .plain import *
from kd_plugins.adapters import ConvAdapter
from kd_plugins.losses import BinaryKLDivLoss, FeatureMSELoss
from kd_plugins.mm import DistillHook
distill = dict(
    teacher=dict(config='{folder}/teacher.py', checkpoint='{folder}/teacher.pth'),
    terms=dict(logits=dict(loss=dict(type=BinaryKLDivLoss), student='head', teacher='head'),
        neck=dict(loss=dict(type=FeatureMSELoss), student='neck[0]', teacher='neck[0]',
            adapter=dict(type=ConvAdapter, in_channels=16, out_channels=32))))
"""
FORMS = dict(
    hook=f'{DISTILL}default_hooks.update(dict(distill=dict(type=DistillHook, **distill)))',
    model=f"""{DISTILL}from kd_plugins.mm import distilled
model.update(dict(type=distilled, student_type=GFL, distill=distill))
default_hooks.update(dict(distill=dict(type=DistillHook)))""",
)


@pytest.fixture(scope='module')
def folder(lab):
    folder = lab.root / 'pure'
    folder.mkdir()
    for name, text in dict(plain=BASE, teacher=TEACHER, **FORMS).items():
        for key, value in dict(root=lab.root, names=CLASSES, folder=folder).items():
            text = text.replace('{' + key + '}', str(value))
        (folder / f'{name}.py').write_text(text)
    model = lab.build(Config.fromfile(folder / 'teacher.py'), 7)
    torch.save(dict(state_dict=model.state_dict()), folder / 'teacher.pth')
    return folder


@pytest.mark.parametrize('form', FORMS)
def test_a_distilled_run_and_what_mmengine_dumped_of_it(folder, form):
    work = folder / f'run_{form}'
    cli.train([str(folder / f'{form}.py'), '--work-dir', str(work)])
    state = torch.load(work / 'epoch_1.pth', weights_only=False)
    assert any('kd' in str(key) for key in state)
    # A name and module for every class; types are strings now.
    dumped = work / f'{form}.py'
    assert "'kd_plugins.mm.DistillHook'" in dumped.read_text().replace('"', "'")
    cli.train([str(dumped), '--work-dir', str(work / 'again')])
    again = torch.load(work / 'again' / 'epoch_1.pth', weights_only=False)
    assert set(again['state_dict']) == set(state['state_dict'])
