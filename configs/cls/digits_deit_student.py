"""The transformer that learns in the demo: a tiny DeiT with a distillation token."""

_base_ = '../_base_/digits_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='deit_tiny_distilled_patch16_224',
    num_classes=10,
    input_size=32,
    patch_size=8,
    embed_dim=64,
    depth=3,
    num_heads=2,
    # timm's own default, a standard deviation of 0.02, suits wide models only: narrow ones stay at chance for longer.
    weight_init='jax',
)
# Higher rates learn more slowly here.
optim_wrapper = dict(optimizer=dict(lr=5e-4))
train_cfg = dict(max_epochs=16)
