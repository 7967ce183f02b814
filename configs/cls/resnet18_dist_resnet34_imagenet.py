# ResNet-34 teaches ResNet-18 on ImageNet: correlations of class probabilities (arXiv 2205.10536).
# Teacher: https://download.pytorch.org/models/resnet34-b627a593.pth
# The paper: teacher 73.31, plain 69.76, distilled 72.07 % top-1; weight: MMRazor. These numbers have not been run here.
_base_ = '../_base_/imagenet_cls.py'
model = dict(type='kd_plugins.TimmClassifier', model='resnet18', num_classes=1000, zero_init_last=False)
teacher = dict(timm='resnet34.tv_in1k', checkpoint='checkpoints/resnet34-b627a593.pth')
loss = dict(type='DISTLoss', beta=1.0, gamma=1.0, temperature=1.0)
terms = dict(logits=dict(loss=loss, student='logits', teacher='logits', weight=2.0))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms))
del teacher, terms, loss  # parts, not options
