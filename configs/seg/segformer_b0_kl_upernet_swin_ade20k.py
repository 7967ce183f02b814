# UPerNet with Swin-T teaches SegFormer-B0 on ADE20K, another architecture: KL of every pixel (arXiv 1903.04197).
# Teacher: https://download.openmmlab.com/mmsegmentation/v0.5/swin/upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K/upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K_20210531_112542-e380ad3e.pth
# Its ADE20K numbers have not been run here.
_base_ = __import__('kd_plugins').config('mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py')
custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
name = 'upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K_20210531_112542-e380ad3e.pth'
teacher = dict(
    config='mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    checkpoint='checkpoints/' + name,
)
loss = dict(type='PixelwiseKLDivLoss', temperature=1.0)
terms = dict(logits=dict(loss=loss, student='decode_head', teacher='decode_head', weight=1.0))
default_hooks = dict(distill=dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms))
del name, teacher, terms, loss  # parts, not options
