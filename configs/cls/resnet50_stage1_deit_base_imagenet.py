# ViT-B/16 teaches ResNet-50 in two stages, as hints do (arXiv 1412.6550). The first: features and attention only.
# Teacher: https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth
# The classifier is frozen and labels count nothing (alpha=1). ImageNet numbers have not been run here.
_base_ = './resnet50_feature_deit_base_imagenet.py'
attention = dict(student='stages[-2]', teacher='net.blocks.11.attn.attn_drop', weight=100.0)
terms = dict(logits=None, attention=dict(loss=dict(type='AttentionTransferLoss'), **attention))
model = dict(freeze=['classifier'], distill=dict(alpha=1.0, terms=terms))
train_cfg = dict(max_epochs=30)
param_scheduler = [dict(type='CosineAnnealingLR', T_max=30)]
del terms, attention  # parts, not options
