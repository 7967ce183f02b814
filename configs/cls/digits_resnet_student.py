"""The CNN that learns in the demo: a ResNet with one narrow block per stage."""

_base_ = '../_base_/digits_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='resnet18',
    num_classes=10,
    input_size=32,
    layers=(1, 1, 1, 1),
    channels=(4, 8, 16, 32),
    output_stride=16,
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_epochs=8)
