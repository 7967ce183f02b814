"""Policy on the digits: the teacher's logits, from a tenth of their size to all of it, then labels alone."""

_base_ = 'digits_resnet_student.py'
default_hooks = dict(
    distill=dict(
        type='kd_plugins.DistillHook',
        teacher=dict(
            config='kd_plugins::cls/digits_resnet_teacher.py', checkpoint='work_dirs/digits_resnet_teacher/epoch_20.pth'
        ),
        recipe='annealing',
    )
)
