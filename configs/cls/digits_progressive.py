"""Policy on the digits: features under a frozen head for a quarter of the run, then predictions and labels."""

_base_ = 'digits_resnet_student.py'
default_hooks = dict(
    distill=dict(
        type='kd_plugins.DistillHook',
        teacher=dict(
            config='kd_plugins::cls/digits_resnet_teacher.py', checkpoint='work_dirs/digits_resnet_teacher/epoch_20.pth'
        ),
        recipe='progressive',
    )
)
