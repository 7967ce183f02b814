# PKD (arXiv 2207.02039): Pearson correlation of the channels on every level of the neck, whatever their magnitude.
terms = dict(neck=dict(loss=dict(type='PearsonLoss'), student='neck', teacher='neck', weight=10.0))
