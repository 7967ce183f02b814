# ResNet-34 teaches ResNet-18 on ImageNet: decoupled distillation (arXiv 2203.08679), beside the whole cross-entropy.
# Teacher: https://download.pytorch.org/models/resnet34-b627a593.pth
# The paper: distilled 71.70 % top-1. These numbers have not been run here.
_base_ = '../_base_/imagenet_cls.py'
model = dict(type='kd_plugins.TimmClassifier', model='resnet18', num_classes=1000, zero_init_last=False)
teacher = dict(timm='resnet34.tv_in1k', checkpoint='checkpoints/resnet34-b627a593.pth')
loss = dict(type='DKDLoss', alpha=1.0, beta=0.5, temperature=1.0)
terms = dict(logits=dict(loss=loss, student='logits', teacher='logits'))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms))
del teacher, terms, loss  # parts, not options
