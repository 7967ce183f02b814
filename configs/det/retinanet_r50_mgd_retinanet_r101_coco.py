# RetinaNet R101 teaches RetinaNet R50 on COCO: masked generative distillation of five FPN levels (arXiv 2205.01529).
# Teacher: https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/<file name below>
# Its COCO numbers have not been run here. Weights: the authors' 2e-5 times 256 channels times the cells of 1333 x 800.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
teacher = dict(
    config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
    checkpoint='checkpoints/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',
)
taps = [dict(student=f'neck[{i}]', teacher=f'neck[{i}]', weight=w) for i, w in enumerate([86.0, 21.5, 5.4, 1.4, 0.4])]
terms = {f'p{i}': dict(loss=dict(type='MGDLoss', mask_ratio=0.65), **tap) for i, tap in enumerate(taps, 3)}
model = dict(type='kd_plugins.Distilled', student_type=_base_.model.type, distill=dict(teacher=teacher, terms=terms))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook'))
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))  # as the authors'
del teacher, terms, taps  # parts, not options
