"""Small classifiers on real handwritten digits (kd-plugins prepare-digits): scans of 8 x 8 pixels, ten classes.

Children give the model, its learning rate and ``train_cfg.max_epochs``. ``DIGITS_ROOT`` in the environment names
another folder. The 1258 images make 19 batches.
"""

default_scope = 'mmengine'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
data_root = '{{$DIGITS_ROOT:data/digits/}}'

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='kd_plugins.ArrayDataset',
        images=data_root + 'scans/train.npz',
        labels=data_root + 'scans/train.npz',
        transform=[dict(type='RandomCrop', size=8, padding=1)],
    ),
)
val_dataloader = dict(
    batch_size=270,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='kd_plugins.ArrayDataset', images=data_root + 'scans/val.npz', labels=data_root + 'scans/val.npz'
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='kd_plugins.Accuracy', topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=20, val_interval=4)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05),
    paramwise_cfg=dict(bias_decay_mult=0.0, norm_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
# Without T_max and end the cosine ends with the run, so that max_epochs is all there is to change.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=0),
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=19),
    # Beside the checkpoint to resume from, the weights alone: timm.create_model(..., checkpoint_path=<this file>).
    checkpoint=dict(type='CheckpointHook', interval=10, max_keep_ckpts=1, published_keys=['state_dict']),
)
