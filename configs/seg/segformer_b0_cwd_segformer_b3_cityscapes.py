# SegFormer-B3 teaches SegFormer-B0 on Cityscapes: channel-wise distillation of the class logits (arXiv 2011.13256).
# Teacher: https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b3_8x1_1024x1024_160k_cityscapes/segformer_mit-b3_8x1_1024x1024_160k_cityscapes_20211206_224823-a8f8a177.pth
# Its Cityscapes numbers have not been run here. T = 4 and weight 3 for logits: as in public training scripts.
_base_ = __import__('kd_plugins').config('mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py')
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
teacher = dict(
    config='mmseg::segformer/segformer_mit-b3_8xb1-160k_cityscapes-1024x1024.py',
    checkpoint='checkpoints/segformer_mit-b3_8x1_1024x1024_160k_cityscapes_20211206_224823-a8f8a177.pth',
)
loss = dict(type='ChannelWiseDivLoss', temperature=4.0)
terms = dict(logits=dict(loss=loss, student='decode_head', teacher='decode_head', weight=3.0))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms))
del teacher, terms, loss  # parts, not options
