# Classic knowledge distillation of classifiers (arXiv 1503.02531): 0.1 cross-entropy + 0.9 T^2 KL.
alpha = 0.9
terms = dict(logits=dict(loss=dict(type='KLDivLoss', temperature=4.0), student='logits', teacher='logits'))
