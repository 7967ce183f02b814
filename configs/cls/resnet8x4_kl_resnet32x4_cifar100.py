# resnet32x4 teaches resnet8x4 on CIFAR-100: KL of the class logits, 0.9 to 0.1 cross-entropy (arXiv 1503.02531).
# Teacher: trained with resnet32x4_cifar100.py, or mdistiller's (its weights have the same names), in the file below.
# The DKD paper (arXiv 2203.08679): 73.33 % top-1. These numbers have not been run here.
_base_ = './resnet8x4_cifar100.py'
pixels = dict(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
teacher = dict(
    module='kd_plugins.classification.cifar_resnet:CifarResNet',
    options=dict(depth=32, num_classes=100),
    checkpoint='checkpoints/resnet32x4_cifar100.pth',
)
terms = dict(logits=dict(loss=dict(type='KLDivLoss', temperature=4.0), student='logits', teacher='logits'))
distill = dict(teacher=dict(**teacher, **pixels), terms=terms, alpha=0.9)
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', **distill))
del distill, teacher, terms, pixels  # parts, not options
