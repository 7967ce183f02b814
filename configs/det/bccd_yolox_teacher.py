"""The teacher for the blood cells: a YOLOX twice as wide as the student."""

_base_ = '../_base_/bccd_yolox.py'
model = dict(
    backbone=dict(widen_factor=0.25),
    neck=dict(in_channels=[64, 128, 256], out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64),
)
train_cfg = dict(max_epochs=50, val_interval=10)
