"""The segmentation student of the demo: a narrow Semantic FPN."""

_base_ = '../_base_/digits_seg.py'
model = dict(
    backbone=dict(stem_channels=16, base_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    decode_head=dict(in_channels=[32, 32, 32, 32], channels=32),
)
