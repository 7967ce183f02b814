"""The batch of the check before the first iteration: what the run will feed, and nothing of the run touched."""

import copy
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from kd_plugins.errors import DistillError
from kd_plugins.mm.copies import LARGE_ARRAY, LARGE_COLLECTION, private_copy
from kd_plugins.mm.example import GREY, NOISE, example_batch


class Cached:
    """A transform with a memory, as mosaic has one."""

    def __init__(self):
        self.cache = []

    def __call__(self, results):
        self.cache.append(results['img'])
        other = random.choice(self.cache)
        return {**results, 'img': results['img'] if other.shape != results['img'].shape else other}


class Pictures(Dataset):
    """Holds its pictures, counts, draws random numbers, and has a lock."""

    def __init__(self, sizes=((8, 12), (10, 9), (8, 8))):
        rng = np.random.default_rng(0)
        self.pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes]
        self.big = np.zeros(LARGE_ARRAY, np.uint8)
        self.generator = np.random.RandomState(0)
        self.lock, self.taken = threading.Lock(), 0
        self.pipeline = SimpleNamespace(transforms=[Cached()])

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        with self.lock:
            self.taken += 1
        random.random(), np.random.rand(), torch.rand(1), self.generator.rand()
        results = dict(img=self.pictures[index])
        for transform in self.pipeline.transforms:
            results = transform(results)
        return dict(inputs=torch.from_numpy(results['img']).permute(2, 0, 1), data_samples=index)


class Preprocessor(ImgDataPreprocessor):
    """Has a size that changes with every batch, and writes into the message hub."""

    size_now = 0

    def forward(self, data, training=False):
        self.size_now += 1
        MessageHub.get_current_instance().update_info('size', self.size_now)
        MessageHub.get_current_instance().update_info('training', training)
        return super().forward(data, training)


class Model(nn.Module):
    def __init__(self, preprocessor=None, channels=3):
        super().__init__()
        self.data_preprocessor = Preprocessor(pad_size_divisor=4) if preprocessor is None else preprocessor
        self.backbone = nn.Conv2d(channels, 2, 1)

    def extract_feat(self, inputs):
        return self.backbone(inputs)


def collate(items):
    return dict(inputs=[i['inputs'] for i in items], data_samples=[i['data_samples'] for i in items])


def runner(dataset, batch_size=2, **options):
    loader = DataLoader(dataset, batch_size, collate_fn=collate, **options)
    return SimpleNamespace(train_loop=SimpleNamespace(dataloader=loader))


def test_the_first_images_as_the_model_gets_them():
    data, model = Pictures(), Model()
    inputs, samples = example_batch(runner(data, batch_size=16), model, 2)
    assert samples == [0, 1] and inputs.shape == (2, 3, 12, 12)
    assert torch.equal(inputs[0, :, :8, :12], torch.from_numpy(data.pictures[0]).permute(2, 0, 1).float())
    assert inputs[0, :, 8:].eq(0).all()
    assert len(example_batch(runner(data, batch_size=1), model)[0]) == 1
    assert len(example_batch(runner(Pictures([(8, 8)]), batch_size=4), model)[0]) == 1
    assert [len(example_batch(runner(data, batch_size=16), model, n)[0]) for n in (1, 2, 3)] == [1, 2, 3]
    # Padded to the size of the largest all the same.
    assert example_batch(runner(data, batch_size=16), model)[0].equal(inputs[:1])
    sampler = torch.utils.data.BatchSampler(range(3), 3, False)
    assert len(example_batch(runner(data, 1, batch_sampler=sampler), model, 2)[0]) == 2
    assert example_batch(runner(data), model.bfloat16())[0].dtype == torch.bfloat16


def test_nothing_of_the_run_is_touched():
    data, model = Pictures(), Model()
    hub = MessageHub.get_current_instance()
    hub.update_info('iter', 7)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    own = copy.deepcopy(data.generator.get_state())[1].tolist()
    information = dict(hub.runtime_info)
    example_batch(runner(data), model)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert data.generator.get_state()[1].tolist() == own
    assert data.taken == 0 and data.pipeline.transforms[0].cache == [] and not data.lock.locked()
    assert model.data_preprocessor.size_now == 0 and dict(hub.runtime_info) == information


def test_copies_share_data_and_nothing_else():
    data = Pictures()
    data.many, data.few = [[0]] * LARGE_COLLECTION, [[0]]
    data.network, data.numbers = nn.Linear(2, 2), torch.zeros(LARGE_ARRAY)
    data.method = data.pipeline.transforms[0].__call__
    made = private_copy(data)
    for key in ('big', 'many', 'network', 'numbers', 'lock'):
        assert getattr(made, key) is getattr(data, key), key
    for key in ('few', 'pictures', 'pipeline', 'generator'):
        assert getattr(made, key) is not getattr(data, key), key
    assert made.method.__self__ is made.pipeline.transforms[0]


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError('must not be read')


class Broken(Pictures):
    def __getitem__(self, index):
        raise OSError('no such file')


@pytest.mark.parametrize('dataset', [Stream(), Broken()])
@pytest.mark.parametrize('channels', [1, 3])
def test_a_grey_picture_where_there_is_no_item(dataset, channels):
    module = ImgDataPreprocessor(mean=[100.0], std=[50.0], pad_size_divisor=32)
    model = Model(module, channels).train()
    dataset.pipeline = SimpleNamespace(transforms=[lambda r: {**r, 'img': r['img'][:100, :200]}])
    inputs, samples = example_batch(runner(dataset), model)
    assert samples is None and inputs.shape == (1, channels, 128, 224)
    pixels = inputs * 50 + 100
    assert abs(pixels.mean() - GREY) < 1 and pixels.max() - pixels.min() <= NOISE and pixels.std() > 1
    assert model.training and model.backbone.training


def test_what_does_not_fit_is_said():
    class Refusing(ImgDataPreprocessor):
        def forward(self, data, training=False):
            raise DistillError('images must be uint8')

    with pytest.raises(DistillError, match='images must be uint8'):
        example_batch(runner(Pictures()), Model(Refusing()))
    with pytest.raises(DistillError, match=r'needs batches of images \(B, C, H, W\), but Model is given list'):
        example_batch(runner(Pictures()), Model(BaseDataPreprocessor()))
