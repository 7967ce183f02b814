"""The CNN that teaches in the demo: a narrow ResNet-18 with a stem of 3 x 3 convolutions."""

_base_ = '../_base_/digits_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='resnet18',
    num_classes=10,
    input_size=8,
    stem_type='deep',
    channels=(32, 64, 128, 256),
    output_stride=8,
)
