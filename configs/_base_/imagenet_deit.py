"""ImageNet-1k with the recipe of DeiT (arXiv 2012.12877): 300 epochs of AdamW and strong augmentation.

8 GPUs with 128 images each: a learning rate of 5e-4 for 512 images, hence 1e-3. Two deviations: no repeated
augmentation (every image is drawn once per epoch, the paper draws a third of them three times), which needs a sampler
of its own; and no average of the weights, which the authors' script keeps but does not evaluate. Children give the
model.
"""

_base_ = './imagenet_cls.py'

model = dict(
    type='kd_plugins.TimmClassifier',
    num_classes=1000,
    drop_path_rate=0.1,
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
    random_erasing=dict(probability=0.25, mode='pixel'),
)
train_dataloader = dict(
    batch_size=128,
    dataset=dict(
        transform=dict(
            _delete_=True,
            input_size=224,
            training=True,
            interpolation='bicubic',
            auto_augment='rand-m9-mstd0.5-inc1',
        )
    ),
)
val_dataloader = dict(
    batch_size=128,
    dataset=dict(transform=dict(_delete_=True, input_size=224, interpolation='bicubic', crop_pct=0.875)),
)
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=300)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        bias_decay_mult=0.0,
        norm_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={key: dict(decay_mult=0.0) for key in ('cls_token', 'dist_token', 'pos_embed')},
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=5, end=300, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=1024)
