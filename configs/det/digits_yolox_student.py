"""The student of the demo: a very narrow YOLOX."""

_base_ = '../_base_/digits_yolox.py'
model = dict(
    backbone=dict(widen_factor=0.125),
    neck=dict(in_channels=[32, 64, 128], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32),
)
optim_wrapper = dict(optimizer=dict(lr=0.003))
