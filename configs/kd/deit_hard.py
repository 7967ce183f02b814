# Hard-label distillation (arXiv 2012.12877, equation 3): half cross-entropy, half the teacher's decision.
alpha = 0.5
terms = dict(logits=dict(loss=dict(type='HardLabelLoss'), student='logits', teacher='logits'))
