# GFL R101 teaches YOLOX-s on COCO, across families: binary KL per class (arXiv 2308.14286) and L2 on decoded boxes.
# Teacher: https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_r101_fpn_mstrain_2x_coco/<file name below>
# Its COCO numbers have not been run here. The three strides that both have (8, 16, 32) are distilled.
_base_ = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
teacher = dict(
    config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
    checkpoint='checkpoints/gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth',
)
boxes, heads = dict(type='YOLOLogitLoss', obj_weight=0, cls_weight=0), dict(student='bbox_head', teacher='bbox_head')
terms = dict(
    cls=dict(loss=dict(type='BinaryKLDivLoss', foreground=True), **heads), box=dict(loss=boxes, weight=0.25, **heads)
)
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms))
del teacher, terms, boxes, heads  # parts, not options
