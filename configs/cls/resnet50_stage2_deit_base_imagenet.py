# ViT-B/16 teaches ResNet-50 in two stages. The second: everything together, on labels, logits and features.
# Teacher: https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth
# Adapters begin anew; they are not part of a student's weights. ImageNet numbers have not been run here.
_base_ = './resnet50_feature_deit_base_imagenet.py'
load_from = 'work_dirs/resnet50_stage1_deit_base_imagenet/epoch_30.pth'
