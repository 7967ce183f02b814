# Distillation through attention (arXiv 2012.12877, section 4): labels teach the class head, the teacher's decision the
# head of the distillation token; half and half. For students with a token.
alpha = 0.5
terms = dict(token=dict(loss=dict(type='HardLabelLoss'), student='dist_logits', teacher='logits'))
