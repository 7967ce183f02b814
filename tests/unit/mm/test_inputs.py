"""What student and teacher are given for pixels: established, or refused."""

import pytest
import torch
from mmcv.transforms import Normalize
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.mm.inputs import TeacherInputs, network_channels, pixel_format, student_format, teacher_format
from kd_plugins.teachers import PixelFormat

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BGR = PixelFormat(MEAN[::-1], STD[::-1])
NORMALIZE = dict(type='Normalize', mean=MEAN, std=STD, to_rgb=True)
GIVEN = dict(mean=MEAN, std=STD, rgb=True)


class Model(nn.Module):
    def __init__(self, preprocessor, channels=3):
        super().__init__()
        self.data_preprocessor = preprocessor
        # Slices channels before its first layer, as YOLOX does.
        self.backbone = nn.Sequential(nn.BatchNorm2d(4 * channels), nn.Conv2d(4 * channels, 2, 1))

    def extract_feat(self, x):
        return self.backbone(torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1))


def config(train=(), test=(), **more):
    load = dict(type='LoadImageFromFile')
    loaders = {
        f'{kind}_dataloader': dict(dataset=dict(type='RepeatDataset', dataset=dict(pipeline=[load, *steps])))
        for kind, steps in (('train', train), ('test', test))
        if steps is not None
    }
    return Config(dict(model=dict(), default_scope='mmdet', **loaders, **more))


def normalised():
    return ImgDataPreprocessor(mean=MEAN[::-1], std=STD[::-1], pad_size_divisor=32)


def refused(match, function, *args, **options):
    with pytest.raises(DistillError, match=match) as error:
        function(*args, **options)
    assert len(str(error.value)) < 400 and 'pixel_format=dict(mean=' in str(error.value)


def test_channels_that_a_network_takes():
    for channels in (1, 3, 5):
        model = Model(None, channels).train()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        assert network_channels(model, [5, None, 3, 1]) == channels
        assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not model.backbone[1]._forward_hooks
    assert network_channels(model, [3, 1]) is None


def test_student():
    assert student_format(Model(normalised())).divisor == 32
    assert student_format(Model(normalised()), [[], []]).mean == BGR.mean
    assert student_format(Model(ImgDataPreprocessor()), [[Normalize(MEAN, STD)]]) == PixelFormat(MEAN, STD, True)
    grey = student_format(Model(ImgDataPreprocessor(mean=[100], std=[50])), [()], torch.zeros(1, 1, 8, 8))
    assert grey == PixelFormat((100.0,), (50.0,))
    assert student_format(Model(normalised()), given=GIVEN) == PixelFormat(MEAN, STD, True, divisor=32)
    refused('in different ways', student_format, Model(ImgDataPreprocessor()), [[], [Normalize(MEAN, STD)]])
    refused('normalised twice', student_format, Model(normalised()), [[Normalize(MEAN, STD)]])


def test_what_was_really_seen():
    batch = (torch.rand(2, 3, 8, 8) * 255 - torch.tensor(BGR.mean).view(3, 1, 1)) / torch.tensor(BGR.std).view(3, 1, 1)
    low, high = student_format(Model(normalised()), inputs=batch).seen
    assert 0 <= low < 20 and 235 < high <= 255.01


@pytest.mark.parametrize('place', ['train', 'test', 'both'])
def test_teacher_normalised_in_its_pipeline(place):
    steps = dict(train=None, test=None)
    steps.update({k: [NORMALIZE] for k in steps if place in (k, 'both')})
    found = teacher_format(Model(BaseDataPreprocessor()), config(**steps))
    assert found == (PixelFormat(MEAN, STD, True), 3)


def test_teacher_of_an_old_config():
    pipeline = [dict(type='LoadImageFromFile'), NORMALIZE, dict(type='Collect')]
    for old in (dict(data=dict(train=dict(pipeline=pipeline))), dict(test_pipeline=pipeline)):
        found = teacher_format(Model(BaseDataPreprocessor()), config(None, None, **old))
        assert found == (PixelFormat(MEAN, STD, True), 3)


def test_teacher_normalised_by_its_preprocessor():
    for cfg in (config(), config(None, None)):
        found, channels = teacher_format(Model(normalised()), cfg, BGR)
        assert (found.mean, found.std, found.divisor, channels) == (BGR.mean, BGR.std, 32, 3)
    grey = PixelFormat((1.0,), (2.0,))
    assert teacher_format(Model(normalised()), config(), grey)[1] == 3
    module = ImgDataPreprocessor(mean=[100], std=[50])
    assert teacher_format(Model(module, 1), config(), grey) == (PixelFormat((100.0,), (50.0,)), 1)
    assert teacher_format(Model(module, 4), config(), PixelFormat((0.0,) * 4, (1.0,) * 4))[1] == 4


def test_teachers_that_cannot_be_understood():
    bare = Model(BaseDataPreprocessor())
    refused('neither a data_preprocessor nor a pipeline', teacher_format, bare, config(None, None))
    refused('for training mean .* for testing mean', teacher_format, bare, config([NORMALIZE], []))
    refused('normalised twice', teacher_format, Model(normalised()), config([NORMALIZE], [NORMALIZE]))
    refused("'MyNormalize', which cannot be built", teacher_format, bare, config([dict(type='MyNormalize')], None))
    for cfg in (config(None, None), config([NORMALIZE], [])):
        assert teacher_format(bare, cfg, given=GIVEN) == (PixelFormat(MEAN, STD, True), 3)


def test_a_preprocessor_that_says_its_format():
    class Sure(BaseDataPreprocessor):
        pixel_format = dict(mean=MEAN, std=STD, rgb=True, pad=1)

        def forward(self, data, training=False):
            raise AssertionError('must not run')

    known = PixelFormat(MEAN, STD, True, 1.0)
    assert pixel_format(Sure()) == known
    assert student_format(Model(Sure()), [[Normalize(MEAN, STD)]]) == known
    assert teacher_format(Model(Sure()), config(None, None)) == (known, 3)


def test_a_preprocessor_that_cannot_be_read():
    class Odd(BaseDataPreprocessor):
        def forward(self, data, training=False):
            return dict(inputs=[x.float() ** 2 for x in data['inputs']])

    refused(r'Odd\) makes of a picture is no', pixel_format, Odd())
    refused(r'Odd\) makes of a picture is no', TeacherInputs, Odd(), BGR)
