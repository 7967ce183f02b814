# Soft distillation with DeiT's settings (arXiv 2012.12877, equation 2): 0.9 cross-entropy + 0.1 T^2 KL.
alpha = 0.1
terms = dict(logits=dict(loss=dict(type='KLDivLoss', temperature=3.0), student='logits', teacher='logits'))
