# YOLOX-l teaches YOLOX-tiny on COCO: L2 on objectness, box and class logits, the YOLO logit KD (arXiv 1805.06361).
# Teacher: https://download.openmmlab.com/mmdetection/v2.0/yolox/yolox_l_8x8_300e_coco/<file name below>
# Its COCO numbers have not been run here.
_base_ = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
teacher = dict(
    config='mmdet::yolox/yolox_l_8xb8-300e_coco.py',
    checkpoint='checkpoints/yolox_l_8x8_300e_coco_20211126_140236-d3bd2b23.pth',
)
terms = dict(logits=dict(loss=dict(type='YOLOLogitLoss'), student='bbox_head', teacher='bbox_head', weight=1.0))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms))
del teacher, terms  # parts, not options
