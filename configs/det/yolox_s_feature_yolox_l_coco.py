# YOLOX-l teaches YOLOX-s on COCO: FitNets hints (arXiv 1412.6550) on the three neck levels, 128 -> 256 channels.
# Teacher: https://download.openmmlab.com/mmdetection/v2.0/yolox/yolox_l_8x8_300e_coco/<file name below>
# Its COCO numbers have not been run here. The 1x1 adapters are trained, so the model itself has to carry them.
_base_ = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
teacher = dict(
    config='mmdet::yolox/yolox_l_8xb8-300e_coco.py',
    checkpoint='checkpoints/yolox_l_8x8_300e_coco_20211126_140236-d3bd2b23.pth',
)
terms = dict(neck=dict(loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck', weight=1.0))
distill = dict(teacher=teacher, terms=terms)
model = dict(type='kd_plugins.Distilled', student_type=_base_.model.type, distill=distill)
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook'))
del teacher, terms, distill  # parts, not options
