"""Policy on the digits: the student agrees with the average of itself."""

_base_ = 'digits_resnet_student.py'
default_hooks = dict(
    distill=dict(
        type='kd_plugins.DistillHook',
        teacher=dict(ema=0.01),
        recipe='ema',
    )
)
