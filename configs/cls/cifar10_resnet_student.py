"""A CNN that learns: a ResNet of 0.3 M parameters with one block per stage."""

_base_ = '../_base_/cifar10_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='resnet10t',
    num_classes=10,
    input_size=32,
    channels=(16, 32, 64, 128),
    output_stride=16,
)
