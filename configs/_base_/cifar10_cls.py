"""Small classifiers on CIFAR-10 as a folder, at a size that two CPU cores can train: 32 x 32 pixels, ten classes.

The data are not part of this project. ``CIFAR10_ROOT`` in the environment names their folder, which holds
``{train,val}/<class>/*.jpg``. Children give the model. The schedule is short on purpose: 12 epochs of a subset with
10,000 images compare methods, they are no result on CIFAR-10.
"""

default_scope = 'mmengine'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
data_root = '{{$CIFAR10_ROOT:data/cifar10/}}'

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='kd_plugins.ImageFolder',
        root=data_root,
        split='train',
        transform=[dict(type='RandomCrop', size=32, padding=4), dict(type='RandomHorizontalFlip')],
    ),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='kd_plugins.ImageFolder', root=data_root, split='val'),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='kd_plugins.Accuracy', topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(bias_decay_mult=0.0, norm_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
# Without T_max and end the cosine ends with the run, so that max_epochs is all there is to change.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=150),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=0),
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
)
