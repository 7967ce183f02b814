"""The student for street photographs: a narrow Semantic FPN."""

_base_ = '../_base_/camvid_seg.py'
model = dict(
    backbone=dict(stem_channels=16, base_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    decode_head=dict(in_channels=[16, 16, 16, 16], channels=16),
)
