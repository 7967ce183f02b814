"""The transformer that teaches in the demo: a small ViT, trained for long."""

_base_ = '../_base_/digits_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='vit_tiny_patch16_224',
    num_classes=10,
    input_size=8,
    patch_size=2,
    embed_dim=96,
    depth=3,
    num_heads=4,
    weight_init='jax',
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_epochs=80)
