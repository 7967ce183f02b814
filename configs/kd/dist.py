# DIST (arXiv 2205.10536): correlations of the class probabilities over classes and images, for teachers much stronger.
terms = dict(
    logits=dict(
        loss=dict(type='DISTLoss', beta=1.0, gamma=1.0, temperature=1.0), student='logits', teacher='logits', weight=2.0
    )
)
