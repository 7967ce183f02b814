"""What pipelines and data preprocessors make of pixels, found by giving them some."""

import random

import numpy as np
import pytest
import torch
from mmcv.transforms import Normalize
from mmdet.datasets.transforms import PhotoMetricDistortion
from mmdet.models.data_preprocessors import DetDataPreprocessor, MultiBranchDataPreprocessor
from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
from mmseg.models import SegDataPreProcessor
from mmseg.registry import TRANSFORMS
from PIL import Image

from kd_plugins.mm.measure import UnreadableError, build_steps, measure, picture_size
from kd_plugins.teachers import PixelFormat

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
IMAGENET = dict(mean=MEAN, std=STD)
BGR = dict(mean=MEAN[::-1], std=STD[::-1])
RAW = ImgDataPreprocessor()


def step(cfg):
    with TRANSFORMS.switch_scope_and_registry('mmdet') as registry:
        return registry.build(cfg)


@pytest.mark.parametrize('cls', [ImgDataPreprocessor, DetDataPreprocessor, SegDataPreProcessor])
def test_preprocessors_of_the_frameworks(cls):
    pad = 'pad_val' if cls is SegDataPreProcessor else 'pad_value'
    assert measure(cls(**IMAGENET, bgr_to_rgb=True, **{pad: 3})) == PixelFormat(MEAN, STD, True, 3.0)
    assert measure(cls(**BGR)) == PixelFormat(MEAN[::-1], STD[::-1])
    assert measure(cls()) == measure(BaseDataPreprocessor()) == measure(None) == PixelFormat()
    assert measure(cls(mean=[0.0], std=[255.0], bgr_to_rgb=True)) == PixelFormat((0.0,) * 3, (255.0,) * 3, True)
    assert measure(cls(mean=[33.3], std=[77.7]), channels=1) == PixelFormat((33.3,), (77.7,))
    assert measure(cls(mean=[33.3], std=[77.7]), channels=5) == PixelFormat((33.3,) * 5, (77.7,) * 5)


def test_what_batches_are_padded_to():
    assert measure(DetDataPreprocessor(pad_size_divisor=32)).divisor == 32
    assert measure(SegDataPreProcessor(size_divisor=16, size=None)).divisor == 16
    assert measure(SegDataPreProcessor(size=(64, 64), test_cfg=dict(size_divisor=8), **BGR)) == PixelFormat(
        MEAN[::-1], STD[::-1]
    )


class Unit(ImgDataPreprocessor):
    """Overrides `forward`: what its own attributes say is not what it does."""

    def forward(self, data, training=False):
        data = self.cast_data(data)
        images = torch.stack([x.float().flip(0) / 255 for x in data['inputs']])
        return dict(inputs=(images - 0.5) / 0.25, data_samples=data['data_samples'])


class Crooked(ImgDataPreprocessor):
    def forward(self, data, training=False):
        return dict(inputs=[x.float().sqrt() for x in data['inputs']])


class Mixing(ImgDataPreprocessor):
    def forward(self, data, training=False):
        return dict(inputs=[x.float().mean(0, keepdim=True) for x in data['inputs']])


class Stacked(ImgDataPreprocessor):
    """Takes batches of tensors only."""

    def forward(self, data, training=False):
        assert data['inputs'].dim() == 4
        return super().forward(data, training)


def test_forwards_of_ones_own():
    assert measure(Unit(**BGR)) == PixelFormat((127.5,) * 3, (63.75,) * 3, True)
    assert measure(Stacked(**BGR)) == PixelFormat(MEAN[::-1], STD[::-1])
    for cls in (Crooked, Mixing):
        with pytest.raises(UnreadableError, match=cls.__name__ + r'\) makes of a picture is no \(pixel - mean\) / std'):
            measure(cls())


def test_preprocessors_that_take_no_pictures():
    class Video(BaseDataPreprocessor):
        def forward(self, data, training=False):
            raise AssertionError('only videos')

    with pytest.raises(UnreadableError, match=r'Video.* does not run on a bare picture .*only videos'):
        measure(Video())
    assert measure(MultiBranchDataPreprocessor(dict(type='mmdet.DetDataPreprocessor', **BGR))).mean == MEAN[::-1]


def test_nothing_is_left_in_the_preprocessor_or_the_generators():
    class Counting(ImgDataPreprocessor):
        calls = 0

        def forward(self, data, training=False):
            self.calls += 1
            random.random(), np.random.rand(), torch.rand(1)
            return super().forward(data, training)

    module = Counting()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    measure(module, [PhotoMetricDistortion()])
    assert module.calls == 0
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize('rgb', [True, False])
def test_normalised_in_the_pipeline(rgb):
    resize = step(dict(type='Resize', scale=(60, 80)))
    found = measure(RAW, [PhotoMetricDistortion(), resize, Normalize(MEAN, STD, rgb)])
    assert found == PixelFormat(MEAN, STD, rgb)
    assert measure(None, [step(dict(type='Pad', size=(64, 64))), Normalize(MEAN, STD, rgb)]) == found
    # Its channels again.
    assert measure(ImgDataPreprocessor(bgr_to_rgb=True), [Normalize(MEAN, STD, rgb)]).rgb is not rgb


def test_grey_and_multispectral_in_the_pipeline():
    assert measure(RAW, [Normalize([100], [50], False)], 1) == PixelFormat((100.0,), (50.0,))
    means, stds = [float(20 * i) for i in range(1, 7)], [float(10 + i) for i in range(6)]
    found = measure(RAW, [lambda r: {**r, 'img': (r['img'] - np.array(means)) / np.array(stds)}], 6)
    assert found == PixelFormat(tuple(means), tuple(stds))


def test_in_two_steps():
    """Scaled by one, normalised by the other, which is no mistake."""
    scaled = measure(ImgDataPreprocessor(mean=[0.5], std=[0.25]), [lambda r: {**r, 'img': r['img'] / 255.0}])
    assert scaled == PixelFormat((127.5,) * 3, (63.75,) * 3)
    with pytest.raises(UnreadableError, match='normalised twice'):
        measure(ImgDataPreprocessor(**BGR), [Normalize(MEAN, STD)])


def grey(results):
    results['img'] = np.repeat(results['img'].mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    return results


def gamma(results):
    return {**results, 'img': (255 * (results['img'] / 255) ** 2).astype(np.uint8)}


def hazy(results):
    results['img'] = (results['img'] * random.uniform(0.5, 1)).astype(np.uint8)
    return results


class Standardize:
    """Not a straight line that is the same every time, but surely no augmentation."""

    def __init__(self, shift=0.0):
        self.shift = shift

    def __call__(self, results):
        results['img'] = np.tanh(results['img'] / 255.0 + self.shift * random.random()).astype(np.float32)
        return results


class NormalizeByFile:
    def __call__(self, results):
        raise KeyError('statistics')


def test_augmentation_is_no_format():
    assert measure(RAW, [grey, hazy, gamma]) == PixelFormat()


@pytest.mark.parametrize('bad', [Standardize(), Standardize(0.1), NormalizeByFile()])
def test_what_scales_in_an_unknown_way_is_not_guessed(bad):
    with pytest.raises(UnreadableError, match=type(bad).__name__):
        measure(RAW, [grey, bad])


def test_order_in_which_images_are_loaded():
    def pillow(results):
        return {**results, 'img': np.array(Image.open(results['img_path']))}

    load = step(dict(type='LoadImageFromFile'))
    assert not measure(RAW, [load]).rgb and measure(RAW, [pillow]).rgb
    assert measure(ImgDataPreprocessor(**IMAGENET, bgr_to_rgb=True), [pillow]) == PixelFormat(MEAN, STD, False)
    assert not measure(RAW, [step(dict(type='LoadImageFromFile', color_type='grayscale'))], 1).rgb


def test_steps_of_a_config():
    old = dict(type='MultiScaleFlipAug', img_scale=(96, 96), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True, scale=(50, 50)), dict(type='Normalize', mean=MEAN, std=STD)])  # fmt: skip
    steps = build_steps([dict(type='LoadImageFromFile'), old, dict(type='Collect', keys=['img'])], 'mmdet')
    assert [type(s).__name__ for s in steps] == ['LoadImageFromFile', 'Resize', 'Normalize']
    assert measure(None, steps) == PixelFormat(MEAN, STD, True)
    with pytest.raises(UnreadableError, match="normalises with 'TheirNormalise', which cannot be built"):
        build_steps([dict(type='TheirNormalise')], 'mmdet')
    # Their numbers are of other pixels than MMCV's.
    theirs = dict(type='Albu', transforms=[dict(type='Normalize', mean=(0.485,) * 3, std=(0.229,) * 3)])
    try:
        steps = build_steps([theirs], 'mmdet')
    except UnreadableError as error:
        assert "normalises with 'Albu'" in str(error)
    else:  # where albumentations is installed
        assert measure(None, steps).std[0] == pytest.approx(0.229 * 255)


def test_size_that_a_pipeline_makes():
    steps = [step(dict(type='LoadImageFromFile')), step(dict(type='Resize', scale=(300, 200)))]
    assert picture_size(steps) == (200, 300)
    assert picture_size([]) is None
