"""A transformer that teaches: a ViT of 0.5 M parameters. From few images it learns slowly, hence 30 epochs."""

_base_ = '../_base_/cifar10_cls.py'
model = dict(
    type='kd_plugins.TimmClassifier',
    model='vit_tiny_patch16_224',
    num_classes=10,
    input_size=32,
    patch_size=4,
    embed_dim=96,
    depth=4,
    num_heads=3,
)
train_cfg = dict(max_epochs=30)
