"""The CNN that learns in the demo: a ResNet with one narrow block per stage."""

_base_ = '../_base_/digits_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='resnet18',
    num_classes=10,
    input_size=8,
    stem_type='deep',
    stem_width=8,
    layers=(1, 1, 1, 1),
    channels=(8, 16, 32, 64),
    output_stride=8,
)
