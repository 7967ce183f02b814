# PSPNet R101 teaches PSPNet R18 on Cityscapes: KL between the class distributions of every pixel (arXiv 1903.04197).
# Teacher: https://download.openmmlab.com/mmsegmentation/v0.5/pspnet/pspnet_r101-d8_512x1024_80k_cityscapes/pspnet_r101-d8_512x1024_80k_cityscapes_20200606_112211-e1e1100f.pth
# Its Cityscapes numbers have not been run here. Pixels without a label do not count.
_base_ = __import__('kd_plugins').config('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py')
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
teacher = dict(
    config='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    checkpoint='checkpoints/pspnet_r101-d8_512x1024_80k_cityscapes_20200606_112211-e1e1100f.pth',
)
loss = dict(type='PixelwiseKLDivLoss', temperature=1.0)
terms = dict(logits=dict(loss=loss, student='decode_head', teacher='decode_head', weight=1.0))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms))
del teacher, terms, loss  # parts, not options
