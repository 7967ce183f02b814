# RTMDet-l teaches RTMDet-tiny on COCO: channel-wise distillation (arXiv 2011.13256) of the neck, 96 -> 256 channels.
# Teacher: https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_l_8xb32-300e_coco/<file name below>
# Its COCO numbers have not been run here. T = 1, 1 per level (they are averaged) and 280 epochs of KD: as in MMYOLO.
_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
teacher = dict(
    config='mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
    checkpoint='checkpoints/rtmdet_l_8xb32-300e_coco_20220719_112030-5a0be7c4.pth',
)
loss = dict(type='ChannelWiseDivLoss', temperature=1.0)
distill = dict(teacher=teacher, terms=dict(neck=dict(loss=loss, student='neck', teacher='neck', weight=3.0)), stop=280)
model = dict(type='kd_plugins.Distilled', student_type=_base_.model.type, distill=distill)
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook'))
del teacher, loss, distill  # parts, not options
