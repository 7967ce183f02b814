"""The teacher for street photographs: a Semantic FPN with twice the student's channels."""

_base_ = '../_base_/camvid_seg.py'
model = dict(
    backbone=dict(stem_channels=32, base_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=32),
    decode_head=dict(in_channels=[32, 32, 32, 32], channels=32),
)
optim_wrapper = dict(optimizer=dict(lr=0.004))
