# As deit_token, but the distillation token learns the teacher's whole distribution instead of its decision.
alpha = 0.5
terms = dict(token=dict(loss=dict(type='KLDivLoss', temperature=1.0), student='dist_logits', teacher='logits'))
