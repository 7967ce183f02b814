"""A CNN that teaches: a narrow ResNet-18 with a stem of 3 x 3 convolutions, 2.8 M parameters; 20 epochs."""

_base_ = '../_base_/cifar10_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='resnet18d',
    num_classes=10,
    input_size=32,
    stem_width=16,
    channels=(32, 64, 128, 256),
    output_stride=16,
)
train_cfg = dict(max_epochs=20)
