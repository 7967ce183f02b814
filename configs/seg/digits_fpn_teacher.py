"""The segmentation teacher of the demo: a Semantic FPN with twice the student's channels."""

_base_ = '../_base_/digits_seg.py'
model = dict(
    backbone=dict(stem_channels=32, base_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=48),
    decode_head=dict(in_channels=[48, 48, 48, 48], channels=48),
)
optim_wrapper = dict(optimizer=dict(lr=0.004))
