"""Which digits are in a scene (kd-plugins prepare-digits)? Several labels per image; a narrow ResNet-18 that teaches.

``DIGITS_ROOT`` in the environment names another folder.
"""

_base_ = '../_base_/digits_cls.py'
data_root = '{{$DIGITS_ROOT:data/digits/}}'

model = dict(
    type='kd_plugins.TimmClassifier',
    model='resnet18',
    num_classes=10,
    input_size=128,
    multi_label=True,
    channels=(32, 64, 128, 256),
)
train_dataloader = dict(
    batch_size=32,
    dataset=dict(
        _delete_=True,
        type='kd_plugins.CocoMultiLabel',
        root=data_root,
        ann_file='annotations/train.json',
        img_prefix='images/train',
        transform=[dict(type='RandomCrop', size=128, padding=8)],
    ),
)
val_dataloader = dict(
    batch_size=50,
    dataset=dict(
        _delete_=True,
        type='kd_plugins.CocoMultiLabel',
        root=data_root,
        ann_file='annotations/val.json',
        img_prefix='images/val',
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='kd_plugins.MultiLabelAP')
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(max_epochs=15)
