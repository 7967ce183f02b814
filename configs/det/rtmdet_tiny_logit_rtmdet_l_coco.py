# RTMDet-l teaches RTMDet-tiny on COCO: binary KL per class (arXiv 2308.14286) and L2 on the box distances, in strides.
# Teacher: https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_l_8xb32-300e_coco/<file name below>
# Its COCO numbers have not been run here; distances of many strides make L2 large, hence the smaller box weight.
_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
teacher = dict(
    config='mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
    checkpoint='checkpoints/rtmdet_l_8xb32-300e_coco_20220719_112030-5a0be7c4.pth',
)
boxes, heads = dict(type='YOLOLogitLoss', obj_weight=0, cls_weight=0), dict(student='bbox_head', teacher='bbox_head')
terms = dict(
    cls=dict(loss=dict(type='BinaryKLDivLoss', foreground=True), **heads), box=dict(loss=boxes, weight=0.25, **heads)
)
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms))
del teacher, terms, boxes, heads  # parts, not options
