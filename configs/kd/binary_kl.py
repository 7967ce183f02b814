# Across families: binary KL per class (arXiv 2308.14286) and L2 on decoded boxes, both where the teacher sees objects.
terms = dict(
    cls=dict(
        loss=dict(type='BinaryKLDivLoss', foreground=True),
        student='bbox_head',
        teacher='bbox_head',
    ),
    box=dict(
        loss=dict(type='YOLOLogitLoss', obj_weight=0, cls_weight=0),
        student='bbox_head',
        teacher='bbox_head',
        weight=0.25,
    ),
)
