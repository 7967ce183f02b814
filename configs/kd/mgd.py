# Masked generative distillation (arXiv 2205.01529): the teacher's neck recovered from 35 % of the student's positions.
terms = dict(neck=dict(loss=dict(type='MGDLoss', mask_ratio=0.65), student='neck', teacher='neck', weight=10.0))
