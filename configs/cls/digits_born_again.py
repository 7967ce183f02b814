"""Policy on the digits: a finished run of the same network teaches the next one."""

_base_ = 'digits_resnet_student.py'
default_hooks = dict(
    distill=dict(
        type='kd_plugins.DistillHook',
        teacher=dict(
            config='kd_plugins::cls/digits_resnet_student.py', checkpoint='work_dirs/digits_resnet_student/epoch_20.pth'
        ),
        recipe='born_again',
    )
)
