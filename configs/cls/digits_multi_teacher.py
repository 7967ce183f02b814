"""Policy on the digits: a CNN and a vision transformer teach together."""

_base_ = 'digits_resnet_student.py'
default_hooks = dict(
    distill=dict(
        type='kd_plugins.DistillHook',
        teachers=dict(
            cnn=dict(
                config='kd_plugins::cls/digits_resnet_teacher.py',
                checkpoint='work_dirs/digits_resnet_teacher/epoch_20.pth',
            ),
            vit=dict(
                config='kd_plugins::cls/digits_vit_teacher.py',
                checkpoint='work_dirs/digits_vit_teacher/epoch_80.pth',
            ),
        ),
        recipe='multi_teacher',
    )
)
