# resnet8x4 alone on CIFAR-100. The DKD paper (arXiv 2203.08679) has this pair; not run here.
_base_ = '../_base_/cifar100_cls.py'
model = dict(model=dict(depth=8))
