"""The CNN that teaches in the demo: a narrow ResNet-18."""

_base_ = '../_base_/digits_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='resnet18',
    num_classes=10,
    input_size=32,
    channels=(48, 96, 192, 384),
    output_stride=8,
)
