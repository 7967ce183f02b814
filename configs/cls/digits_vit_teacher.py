"""The transformer that teaches in the demo: a small vision transformer."""

_base_ = '../_base_/digits_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='vit_tiny_patch16_224',
    num_classes=10,
    input_size=32,
    patch_size=4,
    embed_dim=128,
    depth=4,
    num_heads=4,
)
