"""Policy on the digits: the teacher's probabilities and no labels, three times as long."""

_base_ = 'digits_resnet_student.py'
train_cfg = dict(max_epochs=60, val_interval=10)
default_hooks = dict(
    distill=dict(
        type='kd_plugins.DistillHook',
        teacher=dict(
            config='kd_plugins::cls/digits_resnet_teacher.py', checkpoint='work_dirs/digits_resnet_teacher/epoch_20.pth'
        ),
        recipe='patient',
    )
)
