"""Policy on the digits, of which only thirty times as many zeros as nines are left: rare classes count more."""

_base_ = 'digits_resnet_student.py'
train_dataloader = dict(
    dataset=dict(_delete_=True, type='kd_plugins.LongTail', ratio=30, dataset={{_base_.train_dataloader.dataset}})
)
val_evaluator = dict(per_class=True)
test_evaluator = val_evaluator
default_hooks = dict(
    distill=dict(
        type='kd_plugins.DistillHook',
        teacher=dict(
            config='kd_plugins::cls/digits_resnet_teacher.py', checkpoint='work_dirs/digits_resnet_teacher/epoch_20.pth'
        ),
        recipe='long_tail',
    )
)
