# RegNetY-16GF teaches DeiT-S on ImageNet, otherwise as DeiT-Ti (arXiv 2012.12877).
# Teacher: https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth
# The authors' README: plain 79.9, distilled 81.2 % top-1. These numbers have not been run here.
_base_ = './deit_tiny_token_regnety_160_imagenet.py'
model = dict(model='deit_small_distilled_patch16_224')
