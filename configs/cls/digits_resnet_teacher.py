"""The CNN that teaches in the demo: a narrow ResNet-18."""

_base_ = '../_base_/digits_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='resnet18',
    num_classes=10,
    input_size=32,
    channels=(24, 48, 96, 192),
    output_stride=16,
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_epochs=8)
