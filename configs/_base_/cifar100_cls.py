"""CIFAR-100 with the recipe of mdistiller's table (the code of DKD, arXiv 2203.08679): 240 epochs of SGD.

The data are not part of this project. ``CIFAR100_ROOT`` in the environment names their folder, which holds
``train.npz`` and ``test.npz``, each with ``images`` (N, 32, 32, 3) and ``labels`` (N,). torchvision's copy becomes that
with::

    data = torchvision.datasets.CIFAR100('data', train=True)  # and False, for test.npz
    numpy.savez('data/cifar100/train.npz', images=data.data, labels=data.targets)

Students and teachers are ResNets for images of this size (arXiv 1512.03385, section 4.2), which timm has none of: its
ResNets always have four stages behind a stem that halves the image twice. Children give the depth.
"""

default_scope = 'mmengine'
custom_imports = dict(imports=['kd_plugins.mm', 'kd_plugins.classification.cifar_resnet'], allow_failed_imports=False)
data_root = '{{$CIFAR100_ROOT:data/cifar100}}'

model = dict(
    type='kd_plugins.TimmClassifier',
    model=dict(type='kd_plugins.CifarResNet', num_classes=100),
    num_classes=100,
    input_size=32,
    # Of the training images, in pixels.
    mean=[255 * v for v in (0.5071, 0.4867, 0.4408)],
    std=[255 * v for v in (0.2675, 0.2565, 0.2761)],
)
train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='kd_plugins.ArrayDataset',
        images=f'{data_root}/train.npz',
        labels=f'{data_root}/train.npz',
        transform=[dict(type='RandomCrop', size=32, padding=4), dict(type='RandomHorizontalFlip')],
    ),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='kd_plugins.ArrayDataset',
        images=f'{data_root}/test.npz',
        labels=f'{data_root}/test.npz',
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='kd_plugins.Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=240, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4))
param_scheduler = [dict(type='MultiStepLR', milestones=[150, 180, 210], gamma=0.1)]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=100),
    checkpoint=dict(type='CheckpointHook', interval=10, max_keep_ckpts=3),
)
