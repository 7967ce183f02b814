"""Stages of classifiers: modules that run, shallow to deep, whose outputs are maps of the image."""

import pytest
import torch
from torch import nn

from kd_plugins.adapters import as_map
from kd_plugins.distiller import Capture, Tap
from kd_plugins.errors import DistillError
from kd_plugins.teachers.stages import stages

TIMM = {
    'resnet18': ['act1', 'layer1', 'layer2', 'layer3', 'layer4'],
    'resnetv2_50': ['stem.conv', 'stages.0', 'stages.1', 'stages.2', 'stages.3'],
    'regnety_002': ['stem', 's1', 's2', 's3', 's4'],
    'convnext_atto': ['stages.0', 'stages.1', 'stages.2', 'stages.3'],
    'efficientnet_b0': ['blocks.0', 'blocks.1', 'blocks.2', 'blocks.4', 'blocks.6'],
    'mobilenetv3_small_050': ['bn1', 'blocks.0', 'blocks.1', 'blocks.3', 'blocks.5'],
    'vit_tiny_patch16_224': ['blocks.2', 'blocks.5', 'blocks.8', 'blocks.11'],
    'deit_tiny_distilled_patch16_224': ['blocks.2', 'blocks.5', 'blocks.8', 'blocks.11'],
    'eva02_tiny_patch14_224': ['blocks.2', 'blocks.5', 'blocks.8', 'blocks.11'],
    'mixer_s32_224': ['blocks.1', 'blocks.3', 'blocks.5', 'blocks.7'],
    'swin_tiny_patch4_window7_224': ['layers.0', 'layers.1', 'layers.2', 'layers.3'],
    'levit_128s': ['stages.0', 'stages.1', 'stages.2'],
    'pit_ti_distilled_224': ['transformers.0[0]', 'transformers.1[0]', 'transformers.2[0]'],
    'tnt_s_patch16_224': ['blocks.2[1]', 'blocks.5[1]', 'blocks.8[1]', 'blocks.11[1]'],
    'efficientformer_l1': ['stages.0', 'stages.1', 'stages.2', 'stages.3'],
    'repvit_m0_9': ['stages.0', 'stages.1', 'stages.2', 'stages.3'],
    'swiftformer_xs': ['stages.0', 'stages.1', 'stages.2', 'stages.3'],
    'mobilevit_xxs': ['stages.0', 'stages.1', 'stages.2', 'stages.3', 'final_conv'],
    'vgg11': ['features.1', 'features.4', 'features.9', 'features.14', 'features.19', 'features.20'],
    'densenet121': [
        'features.norm0',
        'features.denseblock1',
        'features.denseblock2',
        'features.denseblock3',
        'features.norm5',
    ],
    'twins_svt_small': ['blocks.0.1', 'blocks.1.1', 'blocks.2.9', 'blocks.3.3'],
    'mvitv2_tiny': ['stages.0', 'stages.1', 'stages.2', 'stages.3'],
    'tresnet_m': ['body.layer1', 'body.layer2', 'body.layer3', 'body.layer4'],
}
TORCHVISION = {
    'resnet18': ['layer1', 'layer2', 'layer3', 'layer4'],
    'vit_b_16': [f'encoder.layers.encoder_layer_{i}' for i in (2, 5, 8, 11)],
    'convnext_tiny': ['features.1', 'features.3', 'features.5', 'features.7'],
    'swin_t': ['features.1', 'features.3', 'features.5', 'features.7'],
    'regnet_y_400mf': [f'trunk_output.block{i}' for i in (1, 2, 3, 4)],
    'mobilenet_v2': ['features.1', 'features.3', 'features.6', 'features.13', 'features.18'],
    'vgg11': ['features.1', 'features.4', 'features.9', 'features.14', 'features.19', 'features.20'],
    'shufflenet_v2_x0_5': ['stage2', 'stage3', 'stage4'],
}


def check_maps(net, expected, size=(224, 224)):
    """The stages are the expected ones and run, each with one tensor, on grids that do not grow."""
    found = stages(net)
    assert found == expected
    taps = [Tap.parse(path, 'net') for path in found]
    net.eval()
    with torch.no_grad(), Capture(net, [tap.module for tap in taps], 'net') as capture:
        net(torch.zeros(1, 3, *size))
    grids = []
    for tap in taps:
        (tensor,) = capture.maps(tap)
        grids.append(as_map(tensor, size).shape[-2:].numel())
    assert grids == sorted(grids, reverse=True) and grids[-1] > 1


@pytest.mark.parametrize('name', TIMM)
def test_timm(name):
    timm = pytest.importorskip('timm')
    size = (256, 256) if name == 'mobilevit_xxs' else (224, 224)
    check_maps(timm.create_model(name, pretrained=False), TIMM[name], size)


@pytest.mark.parametrize('name', TORCHVISION)
def test_torchvision(name):
    models = pytest.importorskip('torchvision.models')
    check_maps(models.get_model(name, weights=None), TORCHVISION[name])


def test_groups_of_a_shallow_transformer():
    timm = pytest.importorskip('timm')
    for depth, blocks in ((2, [0, 1]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 4]), (6, [0, 2, 3, 5])):
        net = timm.create_model('vit_tiny_patch16_224', depth=depth, embed_dim=32, num_heads=2)
        assert stages(net) == [f'blocks.{i}' for i in blocks]


@pytest.mark.parametrize('name', ['crossvit_tiny_240', 'coat_tiny', 'hiera_tiny_224'])
def test_timm_networks_without_stages_that_could_be_tapped(name):
    timm = pytest.importorskip('timm')
    with pytest.raises(DistillError, match=r"cannot be told from its children .*tap a module of it, e\.g\. 'net\."):
        stages(timm.create_model(name, pretrained=False))


def test_any_module_with_numbered_stages():
    net = nn.Sequential()
    for name in ('stem', 'stage_1', 'stage_2', 'fc'):
        net.add_module(name, nn.Identity())
    assert stages(net) == ['stage_1', 'stage_2']


def test_others_are_refused_with_their_children():
    net = nn.Sequential()
    for name in ('stem', 'body', 'fc'):
        net.add_module(name, nn.Identity())
    words = r"The stages of Sequential cannot be told from its children 'stem', 'body', 'fc'; .*'net\.stem'"
    with pytest.raises(DistillError, match=words):
        stages(net)
