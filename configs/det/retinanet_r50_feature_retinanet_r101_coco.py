# RetinaNet R101 teaches RetinaNet R50 on COCO: hints (arXiv 1412.6550) on the five FPN levels and binary KL per class.
# Teacher: https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/<file name below>
# Its COCO numbers have not been run here. Both FPNs have 256 channels: no adapter, the plain model is enough.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
teacher = dict(
    config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
    checkpoint='checkpoints/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',
)
terms = dict(
    neck=dict(loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck', weight=1.0),
    cls=dict(loss=dict(type='BinaryKLDivLoss', foreground=True), student='bbox_head', teacher='bbox_head', weight=0.5),
)
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms))
del teacher, terms  # parts, not options
