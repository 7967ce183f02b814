"""The transformer that learns in the demo: a tiny DeiT with a distillation token."""

_base_ = '../_base_/digits_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='deit_tiny_distilled_patch16_224',
    num_classes=10,
    input_size=32,
    patch_size=4,
    embed_dim=96,
    depth=4,
    num_heads=3,
)
