"""The transformer that learns in the demo: a tiny DeiT with a distillation token."""

_base_ = '../_base_/digits_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='deit_tiny_distilled_patch16_224',
    num_classes=10,
    input_size=8,
    patch_size=2,
    embed_dim=48,
    depth=3,
    num_heads=3,
    # timm's own default, a standard deviation of 0.02, suits wide models only: narrow ones stay at chance for longer.
    weight_init='jax',
)
optim_wrapper = dict(optimizer=dict(lr=5e-3))
train_cfg = dict(max_epochs=40)
