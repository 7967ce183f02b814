# RegNetY-16GF teaches DeiT-Ti on ImageNet: the teacher's decisions for the distillation token (arXiv 2012.12877).
# Teacher: https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth
# The authors' README: plain 72.2, distilled 74.5 % top-1. These numbers have not been run here.
_base_ = '../_base_/imagenet_deit.py'
model = dict(model='deit_tiny_distilled_patch16_224')
teacher = dict(timm='regnety_160.deit_in1k', checkpoint='checkpoints/regnety_160-a5fe301d.pth')
terms = dict(token=dict(loss=dict(type='HardLabelLoss'), student='dist_logits', teacher='logits'))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms, alpha=0.5))
del teacher, terms  # parts, not options
