"""Which digits are in a scene? A ResNet with one narrow block per stage that learns."""

_base_ = './digits_multilabel_teacher.py'
model = dict(model='resnet10t', channels=(8, 16, 32, 64))
