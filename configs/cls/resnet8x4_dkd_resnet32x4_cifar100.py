# resnet32x4 teaches resnet8x4 on CIFAR-100: decoupled distillation beside the whole cross-entropy (arXiv 2203.08679).
# Teacher: as in resnet8x4_kl_resnet32x4_cifar100.py. The weight grows over the first 20 epochs, as the authors'.
# The paper: 76.32 % top-1. These numbers have not been run here.
_base_ = './resnet8x4_kl_resnet32x4_cifar100.py'
loss = dict(_delete_=True, type='DKDLoss', alpha=1.0, beta=8.0, temperature=4.0)
weight = dict(type='linear', start=0.05, end=1.0, until=20 / 240)
default_hooks = dict(distill=dict(alpha=None, terms=dict(logits=dict(loss=loss, weight=weight))))
del loss, weight  # parts, not options
