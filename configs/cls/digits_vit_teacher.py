"""The transformer that teaches in the demo: a small ViT behind a convolutional stem, which 5000 images can teach."""

_base_ = '../_base_/digits_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='vit_tiny_r_s16_p8_224',
    num_classes=10,
    input_size=32,
    patch_size=2,  # of a stem with stride 4: 4 x 4 tokens
    embed_dim=128,
    depth=4,
    num_heads=4,
)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
train_cfg = dict(max_epochs=10)
