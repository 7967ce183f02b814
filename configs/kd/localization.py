# Localization distillation (arXiv 2102.12252): KL over the distance bins of GFL heads, with the class term.
terms = dict(
    ld=dict(loss=dict(type='LocalizationDistillLoss'), student='bbox_head', teacher='bbox_head'),
    cls=dict(loss=dict(type='BinaryKLDivLoss'), student='bbox_head', teacher='bbox_head'),
)
