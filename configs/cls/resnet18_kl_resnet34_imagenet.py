# ResNet-34 teaches ResNet-18 on ImageNet: KL of the class logits at temperature 1 (arXiv 1503.02531).
# Teacher: https://download.pytorch.org/models/resnet34-b627a593.pth
# Balance and 71.03 % top-1: mdistiller, the code of arXiv 2203.08679. These numbers have not been run here.
_base_ = '../_base_/imagenet_cls.py'
model = dict(type='kd_plugins.TimmClassifier', model='resnet18', num_classes=1000, zero_init_last=False)
teacher = dict(timm='resnet34.tv_in1k', checkpoint='checkpoints/resnet34-b627a593.pth')
terms = dict(logits=dict(loss=dict(type='KLDivLoss', temperature=1.0), student='logits', teacher='logits'))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms, alpha=0.5))
del teacher, terms  # parts, not options
