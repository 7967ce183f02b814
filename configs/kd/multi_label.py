# Multi-label classifiers: binary KL of every class on its own (as in arXiv 2308.14286), half and half with the labels.
alpha = 0.5
terms = dict(logits=dict(loss=dict(type='BinaryKLDivLoss'), student='logits', teacher='logits'))
