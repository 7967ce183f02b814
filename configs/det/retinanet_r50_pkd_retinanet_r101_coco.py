# RetinaNet R101 teaches RetinaNet R50 on COCO: PKD, the Pearson correlation of five FPN levels (arXiv 2207.02039).
# Teacher: https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/<file name below>
# Its COCO numbers have not been run here. Levels are averaged: 50 is the 10 per level of MMRazor's RetinaNet.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
teacher = dict(
    config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
    checkpoint='checkpoints/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',
)
terms = dict(neck=dict(loss=dict(type='PearsonLoss'), student='neck', teacher='neck', weight=50.0))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms))
del teacher, terms  # parts, not options
