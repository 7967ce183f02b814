# ViT-B/16 teaches ResNet-50 on ImageNet, across architectures: logits (arXiv 1503.02531), last stage (2207.02039).
# Teacher: https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth
# DeiT-B without distillation, 81.8 % top-1. Weights are a start, not tuned; ImageNet numbers have not been run here.
_base_ = '../_base_/imagenet_cls.py'
teacher = dict(timm='deit_base_patch16_224.fb_in1k', checkpoint='checkpoints/deit_base_patch16_224-b5f2ef4d.pth')
terms = dict(
    logits=dict(loss=dict(type='KLDivLoss', temperature=1.0), student='logits', teacher='logits'),
    stage=dict(loss=dict(type='PearsonLoss'), student='stages[-1]', teacher='stages[-1]', weight=5.0),
)
student = dict(student_type='kd_plugins.TimmClassifier', model='resnet50', num_classes=1000)
model = dict(type='kd_plugins.Distilled', **student, distill=dict(teacher=teacher, terms=terms))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook'))
del student, teacher, terms  # parts, not options
