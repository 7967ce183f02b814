"""ImageNet-1k at 224 x 224 with the recipe that papers on distilling ResNets share: 100 epochs of SGD.

The data are not part of this project. ``IMAGENET_ROOT`` in the environment names their folder, which holds
``{train,val}/<wnid>/*.JPEG``. 8 GPUs with 32 images each: a learning rate of 0.1 for 256 images, divided by 10 at
epochs 30, 60 and 90, as in the training code of DKD (arXiv 2203.08679). ``--auto-scale-lr`` adapts it to another number
of images. Children give the model.
"""

default_scope = 'mmengine'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
data_root = '{{$IMAGENET_ROOT:data/imagenet/}}'

train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='kd_plugins.ImageFolder',
        root=data_root,
        split='train',
        transform=[dict(type='RandomResizedCrop', size=224), dict(type='RandomHorizontalFlip')],
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='kd_plugins.ImageFolder',
        root=data_root,
        split='val',
        transform=[dict(type='Resize', size=256), dict(type='CenterCrop', size=224)],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='kd_plugins.Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4))
param_scheduler = [dict(type='MultiStepLR', milestones=[30, 60, 90], gamma=0.1)]
auto_scale_lr = dict(enable=False, base_batch_size=256)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=100),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3),
)
