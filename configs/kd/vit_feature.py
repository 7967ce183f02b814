# Across architectures, ViT to CNN or back: the deepest two stages through trained adapters, and the logits. Correlation
# as in PKD (arXiv 2207.02039), because the magnitudes of a transformer's tokens mean nothing to a CNN.
terms = dict(
    logits=dict(loss=dict(type='KLDivLoss', temperature=4.0), student='logits', teacher='logits'),
    last=dict(loss=dict(type='PearsonLoss'), student='stages[-1]', teacher='stages[-1]', weight=5.0),
    before=dict(loss=dict(type='PearsonLoss'), student='stages[-2]', teacher='stages[-2]', weight=5.0),
)
