"""A transformer that learns: a tiny DeiT with a distillation token, 0.2 M parameters on 8 x 8 patches."""

_base_ = '../_base_/cifar10_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='deit_tiny_distilled_patch16_224',
    num_classes=10,
    input_size=32,
    patch_size=4,
    embed_dim=64,
    depth=4,
    num_heads=2,
)
