"""The check before the first iteration uses what the run will feed, and leaves everything as it was."""

import copy

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from PIL import Image

from kd_plugins.errors import DistillError
from tests.integration.lab import CLASSES, FEATURES, Probe, distill_hook, weights
from tests.integration.promises import difference, weighted

KL = dict(logits=dict(loss=dict(type='BinaryKLDivLoss'), student='head', teacher='head'))

MIXED = """
pipeline = [
    dict(type='Mosaic', img_scale=(96, 96), pad_val=114.0),
    dict(type='RandomAffine', scaling_ratio_range=(0.5, 1.5), border=(-48, -48)),
    dict(type='MixUp', img_scale=(96, 96), ratio_range=(0.8, 1.6), pad_val=114.0),
    dict(type='YOLOXHSVRandomAug'), dict(type='RandomFlip', prob=0.5), *pipeline[2:3],
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False), dict(type='PackDetInputs')]
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
pictures = {k: v for k, v in dataset.items() if k != '_delete_'}
train_dataloader['dataset'] = dict(
    _delete_=True, type='MultiImageMixDataset', pipeline=pipeline, dataset=dict(**{**pictures, 'pipeline': load}))
"""
CACHED = """
pipeline[2:3] = [
    dict(type='CachedMosaic', img_scale=(96, 96), pad_val=114.0, max_cached_images=5, random_pop=False),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='CachedMixUp', img_scale=(96, 96), ratio_range=(1.0, 1.0), max_cached_images=4, random_pop=False)]
model['data_preprocessor']['batch_augments'] = [
    dict(type='BatchSyncRandomResize', random_size_range=(64, 128), size_divisor=32, interval=1)]
"""


@pytest.mark.parametrize('extra', [MIXED, CACHED], ids=['mixed images', 'cached images, sizes that change'])
def test_weight_zero_equals_the_plain_run_where_the_pipeline_has_a_memory(lab, extra):
    config = lab.plain(extra=extra, steps=3)
    plain, distilled = Probe(), Probe()
    one = lab.train(config, plain)
    other = lab.train(lab.hook_form(config, lab.teacher(), weighted(dict(features=FEATURES), 0.0)), distilled)
    assert difference(weights(one), weights(other)) == {}
    for ours, without in zip(distilled.logs, plain.logs, strict=True):
        assert {k: v for k, v in ours.items() if 'kd' not in k} == without


def first_forwards(lab, config):
    """What the backbone is given in the check and in the first iteration."""
    runner, seen = lab.runner(config), []
    runner.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    runner.train()
    return runner, seen[:2]


def test_the_check_is_on_real_images(lab):
    config = lab.hook_form(lab.plain(steps=1, train_dataloader__sampler__shuffle=False), lab.teacher())
    config.train_dataloader.dataset.pipeline.pop(3)  # the random flip
    _, (checked, trained) = first_forwards(lab, config)
    # The first of the two that the run batches, padded to the size of both.
    assert torch.equal(checked, trained[:1]) and checked.shape == (1, 3, 96, 96)


@TRANSFORMS.register_module()
class AsGiven(BaseTransform):
    """Four channels of a picture of three."""

    def transform(self, results):
        results['img'] = np.concatenate([results['img'], results['img'][..., :1]], -1)
        return results


def grey(config):
    config.model.data_preprocessor.update(mean=[100.0], std=[50.0], bgr_to_rgb=False)
    config.model.backbone.in_channels = 1
    for loader in (config.train_dataloader, config.get('test_dataloader')):
        if loader:
            loader.dataset.pipeline[0] = dict(type='LoadImageFromFile', color_type='grayscale')
    return config


def four(config):
    config.model.data_preprocessor.update(mean=None, std=None, bgr_to_rgb=False)
    config.model.backbone.in_channels = 4
    for loader in (config.train_dataloader, config.get('test_dataloader')):
        if loader:
            loader.dataset.pipeline.insert(1, dict(type='AsGiven'))
    return config


@pytest.fixture(scope='module')
def save(lab, tmp_path_factory):
    """Writes a changed config of a teacher, with weights."""
    folder = tmp_path_factory.mktemp('teachers')

    def write(name, change):
        config = change(Config.fromfile(lab.teacher('gfl', 8)['config']))
        config.dump(folder / f'{name}.py')
        torch.save(dict(state_dict=lab.build(config, 5).state_dict()), folder / f'{name}.pth')
        return dict(config=str(folder / f'{name}.py'), checkpoint=str(folder / f'{name}.pth'))

    return write


def taught(lab, config, teacher, **options):
    """The first batch that the teacher's network is given in a run of one iteration."""
    runner = lab.runner(lab.hook_form(config, teacher, KL, **options))
    found = []

    class Watch(Probe):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            model = distill_hook(runner).session.teacher.model
            model.backbone.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))

    watch = Watch()
    runner.register_hook(watch)
    runner.train()
    assert watch.logs[0]['loss_kd_logits'] > 0
    return found[0], distill_hook(runner).session.teacher


@pytest.mark.parametrize('channels', ['1 to 1', '1 to 3', '4 to 4'])
def test_channels_of_student_and_teacher(lab, save, channels):
    student = (four if channels[0] == '4' else grey)(lab.plain('gfl', steps=1))
    teacher = lab.teacher('gfl') if channels[-1] == '3' else save(channels[-1], four if channels[-1] == '4' else grey)
    images, described = taught(lab, student, teacher)
    assert images.shape[1] == described.channels == int(channels[-1])
    if channels[-1] == '3':
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
        pixels = (images * std + mean)[:, :, :40, :40]
        assert pixels.std(1).max() < 1e-3 and pixels.max() > 100, 'the same grey three times'


def test_a_grey_teacher_of_coloured_images_is_refused(lab, save):
    config = lab.hook_form(lab.plain('gfl', steps=1), save('grey', grey), KL)
    with pytest.raises(DistillError, match='sees images of 3 channels and the teacher takes 1'):
        lab.train(config)


NORMALIZE = dict(type='Normalize', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)


def in_the_pipeline(config):
    """As configs of mmdet 2 do it."""
    del config.model['data_preprocessor']
    config.train_dataloader.dataset.pipeline.insert(4, dict(NORMALIZE))
    if config.get('test_dataloader'):
        config.test_dataloader.dataset.pipeline.insert(2, dict(NORMALIZE))
    return config


@MODELS.register_module()
class Unusual(DetDataPreprocessor):
    """What it does is not what its attributes say."""

    def forward(self, data, training=False):
        data = super().forward(data, training)
        return {**data, 'inputs': data['inputs'].flip(1) / 100 - 1}


def unusual(config):
    config.model.data_preprocessor = dict(type='Unusual', pad_size_divisor=32)
    return config


@pytest.mark.parametrize(
    ('student', 'teacher'), [(None, in_the_pipeline), (in_the_pipeline, None), (None, unusual), (unusual, None)]
)
def test_the_teacher_sees_its_own_pixels_however_they_are_normalised(lab, save, student, teacher):
    """Inside the pictures; the batch's padding was compared elsewhere."""
    config = lab.plain('gfl', steps=1)
    config.train_dataloader.sampler.shuffle = False
    config.train_dataloader.dataset.pipeline.pop(3)
    config.model.data_preprocessor.pad_size_divisor = 32
    name = 'plain' if teacher is None else teacher.__name__
    target = save(name, teacher or (lambda c: c))
    made, _ = taught(lab, config if student is None else moved(student, config), target)
    raw = np.array(Image.open(lab.root / 'images' / '0.png'))
    height, width = raw.shape[:2]
    if teacher is unusual:
        wanted = torch.from_numpy(raw.copy()).permute(2, 0, 1) / 100 - 1
    else:
        mean, std = (torch.tensor(NORMALIZE[k]).view(3, 1, 1) for k in ('mean', 'std'))
        wanted = (torch.from_numpy(raw.copy()).permute(2, 0, 1) - mean) / std
    assert (made[0, :, :height, :width] - wanted).abs().max() < 1e-4


def moved(change, config):
    config = copy.deepcopy(config)
    if change is in_the_pipeline:
        del config.model['data_preprocessor']
        config.train_dataloader.dataset.pipeline.insert(3, dict(NORMALIZE))
        # Batches of a bare model are of one size.
        config.train_dataloader.dataset.pipeline.insert(4, dict(type='Pad', size=(96, 96)))
        config.model.data_preprocessor = dict(type='DetDataPreprocessor', pad_size_divisor=32)
        return config
    return change(config)


PADDED = dict(neck=dict(loss=dict(type='FeatureMSELoss'), student='neck[0]', teacher='neck[0]'))


@pytest.mark.parametrize('terms', [KL, PADDED], ids=['heads', 'maps'])
def test_a_teacher_that_needs_larger_sides_gets_them(lab, terms):
    """YOLOX merges its levels cell by cell: images of 96 x 70 pixels are none for it."""
    config = lab.plain('gfl', steps=2)
    config.model.data_preprocessor.pad_size_divisor = 1
    probe = Probe()
    runner = lab.runner(lab.hook_form(config, lab.teacher('yolox'), terms), probe)
    sizes = []

    class Watch(Probe):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            images = [tuple(image.shape[-2:]) for image in data_batch['inputs']]
            sizes.append(tuple(map(max, zip(*images, strict=True))))

    runner.register_hook(Watch())
    runner.train()
    assert any(side % 32 for size in sizes for side in size), 'nothing had to be padded'
    assert all(0 < log[f'loss_kd_{name}'] < 100 for log in probe.logs for name in terms)


def test_data_sets_that_mmdet_concatenates(lab):
    """Their common metainfo is a list where they differ in anything."""
    config = lab.plain(steps=1)
    one = config.train_dataloader.dataset
    other = copy.deepcopy(one)
    other.metainfo = dict(classes=CLASSES, palette=[(1, 2, 3)] * 3)
    config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[one, other])
    probe = Probe()
    lab.train(lab.hook_form(config, lab.teacher()), probe)
    assert probe.logs[0]['loss_kd_logits'] > 0
    other.metainfo = dict(classes=CLASSES[::-1])
    with pytest.raises(DistillError, match=r'CocoDataset .* has 3 .circle, square, bar., CocoDataset .* has 3 .bar, '):
        lab.train(lab.hook_form(config, lab.teacher()))
    # Features have no classes.
    lab.train(lab.hook_form(config, lab.teacher(), dict(features=FEATURES)), probe)
    assert probe.logs[-1]['loss_kd_features'] > 0


@pytest.mark.parametrize(
    'wrapped',
    [
        lambda d: dict(type='RepeatDataset', times=2, dataset=d),
        lambda d: dict(type='ConcatDataset', datasets=[d, copy.deepcopy(d)]),
        lambda d: dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=d),
    ],
    ids=['repeated', 'concatenated', 'balanced'],
)
def test_classification_data_in_wrappers(cls_lab, wrapped):
    config = cls_lab.plain('resnet', steps=1)
    config.train_dataloader.dataset = wrapped(config.train_dataloader.dataset)
    probe = Probe()
    cls_lab.train(cls_lab.hook_form(config, cls_lab.teacher()), probe)
    assert probe.logs[0]['loss_kd_logits'] > 0
