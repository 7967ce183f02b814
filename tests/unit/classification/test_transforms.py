"""Transforms from configs: plain pixels come out, and what cannot work is refused."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from kd_plugins.classification.transforms import Transform, build_transform
from kd_plugins.errors import DistillError

DEIT = 'rand-m9-mstd0.5-inc1'


def picture(height=40, width=50, mode='RGB'):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@pytest.mark.parametrize('mode,channels', [('RGB', 3), ('L', 1)])
def test_none_keeps_every_pixel(mode, channels):
    result = build_transform(None)(picture(mode=mode))
    assert result.dtype == torch.uint8 and result.shape == (channels, 40, 50) and result.is_contiguous()
    expected = np.asarray(picture(mode=mode)).reshape(40, 50, channels)
    assert np.array_equal(result.permute(1, 2, 0), expected)


@pytest.mark.parametrize('mode,channels', [('RGB', 3), ('L', 1)])
@pytest.mark.parametrize(
    'options',
    [
        dict(training=True, auto_augment=DEIT),
        dict(training=True, auto_augment='augmix-m5'),
        dict(training=True, auto_augment='v0'),
        dict(training=True, color_jitter=0.3, hflip=0.0, scale=(0.5, 1.0)),
        dict(training=True, no_aug=True),
        dict(training=True, interpolation='random', train_crop_mode='rkrc'),
        dict(),
        dict(crop_pct=1.0, crop_mode='squash'),
    ],
)
def test_timm_recipes_give_uint8(options, mode, channels):
    transform = pickle.loads(pickle.dumps(build_transform(dict(input_size=(24, 32), **options), channels)))
    results = [transform(picture(mode=mode)) for _ in range(8)]
    assert all(r.dtype == torch.uint8 and r.shape == (channels, 24, 32) for r in results)
    # Not scaled to [0, 1]. A single one may be black: AutoAugment moves some pictures out of sight.
    assert max(r.max() for r in results) > 1


def test_a_timm_model_gives_the_defaults():
    text = repr(build_transform(dict(model='deit_tiny_patch16_224')))
    assert 'Resize(size=248, interpolation=bicubic' in text and '(224, 224)' in text  # crop_pct 0.9
    text = repr(build_transform(dict(model='resnet18.tv_in1k')))
    assert 'Resize(size=256, interpolation=bilinear' in text  # crop_pct 0.875
    text = repr(build_transform(dict(model='resnet18.tv_in1k', input_size=32, crop_pct=1.0, interpolation='nearest')))
    assert 'Resize(size=32, interpolation=nearest' in text
    assert 'interpolation=bicubic' in repr(build_transform(dict(model='deit_tiny_patch16_224', training=True)))


def test_evaluation_is_what_timm_does():
    from timm.data import create_transform

    expected = create_transform(32, interpolation='bicubic', crop_pct=0.9, normalize=False)(picture())
    ours = build_transform(dict(model='deit_tiny_patch16_224', input_size=32))(picture())
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    'model,channels,fill',
    [
        ('deit_tiny_patch16_224', 3, (124, 116, 104)),  # 255 x ImageNet's mean
        ('inception_v3', 3, (128, 128, 128)),
        ('deit_tiny_patch16_224', 1, (114,)),  # PIL takes one number for a grey image
    ],
)
def test_what_a_rotation_uncovers_gets_the_models_mean(model, channels, fill):
    compose = build_transform(dict(model=model, training=True, auto_augment=DEIT), channels).apply
    (augment,) = [step for step in compose.transforms if hasattr(step, 'ops')]
    assert {op.kwargs['fillcolor'] for op in augment.ops} == {fill}


@pytest.mark.parametrize('auto_augment', ['rand-m10-n9-p1-inc1', 'v0', 'augmix-m10'])
def test_posterize_to_no_bits_is_black_and_no_crash(auto_augment):
    """Pillow 13 raises for 0 bits, which timm 1.0.31 asks for at full magnitude: 3 in 1000 images of DeiT's recipe."""
    compose = build_transform(dict(input_size=8, training=True, auto_augment=auto_augment)).apply
    ops = [op for step in compose.transforms for op in getattr(step, 'ops', ())]
    ops += [op for step in compose.transforms for policy in getattr(step, 'policy', ()) for op in policy]
    posterize = [op for op in ops if op.name.startswith('Posterize')]
    assert posterize
    for op in posterize:
        assert np.asarray(op.aug_fn(picture(), 0)).max() == 0
        assert np.array_equal(np.asarray(op.aug_fn(picture(), 1)), np.asarray(picture()) & 128)
    seed(0)
    for _ in range(60):
        compose(picture())


def test_the_same_seeds_give_the_same_pictures():
    transform = build_transform(dict(input_size=32, training=True, auto_augment=DEIT))
    runs = []
    for value in (1, 1, 2):
        seed(value)
        runs.append(torch.stack([transform(picture()) for _ in range(4)]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_torchvision_transforms_by_name():
    cfg = [dict(type='RandomCrop', size=32, padding=4), dict(type='RandomHorizontalFlip', p=1.0)]
    result = build_transform(cfg)(picture(32, 32))
    assert result.dtype == torch.uint8 and result.shape == (3, 32, 32)
    flipped = build_transform(cfg[1:])(picture())
    assert torch.equal(flipped, build_transform(None)(picture()).flip(2))
    assert torch.equal(build_transform([])(picture()), build_transform(None)(picture()))


def test_torchvision_names_in_strings_and_nested():
    cfg = [
        dict(type='Resize', size=(24, 24), interpolation='bicubic'),
        dict(type='RandomApply', p=1.0, transforms=[dict(type='RandomHorizontalFlip', p=1.0)]),
        dict(type='AutoAugment', policy='cifar10', interpolation='bilinear'),
        dict(type='ToImage'),
    ]
    result = pickle.loads(pickle.dumps(build_transform(cfg)))(picture())
    assert type(result) is torch.Tensor and result.shape == (3, 24, 24) and result.dtype == torch.uint8


@pytest.mark.parametrize(
    'cfg,message',
    [
        (dict(), 'needs input_size'),
        (dict(model='deit_tiny_patch16_225'), "no model 'deit_tiny_patch16_225'; did you mean 'deit_tiny_patch16_224'"),
        (dict(model='hf-hub:timm/resnet18'), 'write input_size, interpolation and crop_pct'),
        (dict(input_size=0), 'input_size must be a whole number >= 1'),
        (dict(input_size=32, is_training=True), "no option 'is_training': did you mean 'training'"),
        (dict(input_size=32, training='yes'), "training must be True or False, got 'yes'"),
        (dict(input_size=32, auto_augment=DEIT), 'auto_augment acts only with training=True'),
        (dict(input_size=32, training=True, crop_pct=1.0), 'crop_pct acts only with training=False'),
        (dict(input_size=32, training=True, auto_augment='radn-m9'), "refuses .*'radn-m9'"),
        (dict(input_size=32, training=True, scale=3), 'refuses .*scale=3'),
        (dict(input_size=32, training=True, re_prob=0.25), r'model: random_erasing=dict\(...\)'),
        (dict(input_size=32, normalize=True), 'the model normalises'),
        (dict(input_size=32, mean=(0.5, 0.5, 0.5)), 'the model normalises'),
        (dict(input_size=32, mixup_alpha=0.8), 'whole batch'),
        (dict(input_size=32, interpolation='bicubi'), "cannot be 'bicubi': did you mean 'bicubic'"),
        (dict(input_size=32, interpolation='random'), "cannot be 'random'"),
        (dict(input_size=32, crop_mode='squas'), "did you mean 'squash'"),
        ([dict(type='RandomCropp', size=32)], "no transform 'RandomCropp': did you mean 'RandomCrop'"),
        (
            [dict(type='RandomCrop', sice=32)],
            r"transform\[0\] \(RandomCrop\) has no option 'sice': did you mean 'size'",
        ),
        ([dict(type='RandomCrop')], r'transform\[0\]: torchvision refuses'),
        ([dict(type='Resize', size=8, interpolation='bicubi')], "'bicubi' is not a valid"),
        ([dict(type='ToTensor')], 'the model normalises'),
        ([dict(type='RandomErasing')], r'random_erasing=dict\(...\)'),
        ([dict(type='MixUp')], 'mixup=dict'),
        (['RandomCrop'], 'must be a dict'),
        (dict(type='RandomCrop', size=32), 'must be options of timm'),
        ('RandomCrop', 'must be options of timm'),
    ],
)
def test_bad_configs_are_refused(cfg, message):
    with pytest.raises(DistillError, match=message):
        build_transform(cfg)


def test_a_transform_that_gives_no_uint8_is_refused():
    transform = build_transform([dict(type='FiveCrop', size=8)])
    with pytest.raises(DistillError, match='not tuple'):
        transform(picture())
    with pytest.raises(DistillError, match=r'not torch.float32 \(3, 40, 50\)'):
        Transform(lambda image: torch.zeros(3, *image.size[::-1]))(picture())
