# Decoupled knowledge distillation (arXiv 2203.08679) as on CIFAR-100; on ImageNet: beta=0.5, temperature=1.
# The weight grows over the first twelfth of the run (20 of 240 epochs).
terms = dict(
    logits=dict(
        loss=dict(type='DKDLoss', alpha=1.0, beta=8.0, temperature=4.0),
        student='logits',
        teacher='logits',
        weight=dict(type='linear', start=0.05, end=1.0, until=1 / 12),
    )
)
