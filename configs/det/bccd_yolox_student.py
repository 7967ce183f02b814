"""The student for the blood cells: a very narrow YOLOX."""

_base_ = '../_base_/bccd_yolox.py'
model = dict(
    backbone=dict(widen_factor=0.125),
    neck=dict(in_channels=[32, 64, 128], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32),
)
optim_wrapper = dict(optimizer=dict(lr=0.003))
train_cfg = dict(max_epochs=40, val_interval=8)
