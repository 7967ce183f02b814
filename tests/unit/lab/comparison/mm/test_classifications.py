"""Predictions are read as tools/test.py leaves them, images as the data set reads them; other data are noticed."""

import pickle

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from kd_plugins.lab.comparison.classifications import Guess
from kd_plugins.lab.comparison.mm.classifications import read_classifications
from kd_plugins.lab.comparison.mm.experiment import data_hashes

pytest.importorskip('torchvision')
IMAGES = [(f'{kind}/{i}.png', label) for label, kind in enumerate(('cat', 'dog')) for i in range(4)]


@pytest.fixture
def config(tmp_path):
    for split in ('train', 'val'):
        for i, (name, _) in enumerate(IMAGES):
            write(tmp_path / 'images' / split / name, np.full((2, 3, 3), 10 * i))
    dataset = dict(type='kd_plugins.ImageFolder', root=str(tmp_path / 'images'))
    return Config(
        dict(
            custom_imports=dict(imports=['kd_plugins.mm']),
            train_dataloader=dict(dataset=dict(dataset, split='train')),
            test_dataloader=dict(dataset=dict(dataset, split='val')),
        )
    )


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def predictions(root, model, shift=0, images=IMAGES):
    """A file of ``tools/test.py --out`` in which a model is right but for the last ``shift`` images."""
    samples = []
    for i, (name, label) in enumerate(images):
        guess = 1 - label if i >= len(images) - shift else label
        score = torch.tensor([0.25, 0.25])
        score[guess] = 0.75
        path = str(root / 'images' / 'val' / name)
        samples.append(dict(img_path=path, gt_label=torch.tensor(label), pred_score=score))
    file = root / f'{model}.pkl'
    file.write_bytes(pickle.dumps(samples))
    return file


def test_guesses_and_images(config, tmp_path):
    files = dict(teacher=predictions(tmp_path, 'teacher'), plain=predictions(tmp_path, 'plain', shift=2))
    found = read_classifications(files, config, 4)
    assert list(found.groups.values()) == [['dog/2.png', 'dog/3.png'], ['cat/1.png', 'dog/0.png']]
    assert found.truth == {'dog/2.png': 1, 'dog/3.png': 1, 'cat/1.png': 0, 'dog/0.png': 1}
    assert found.found['plain']['dog/3.png'] == Guess(0, 0.75)
    assert found.found['teacher']['dog/3.png'] == Guess(1, 0.75)
    assert found.classes == ('cat', 'dog') and list(found.found) == ['teacher', 'plain']
    assert found.pictures['cat/1.png'].shape == (2, 3, 3) and (found.pictures['cat/1.png'] == 10).all()


def test_grey_images_are_drawn(config, tmp_path):
    config.test_dataloader.dataset.in_chans = 1
    found = read_classifications(dict(plain=predictions(tmp_path, 'plain')), config, 2)
    assert next(iter(found.pictures.values())).shape == (2, 3, 3)


def test_no_picture_of_predictions_that_do_not_belong_together(config, tmp_path):
    plain = predictions(tmp_path, 'plain')
    assert read_classifications(dict(teacher=tmp_path / 'nowhere.pkl', plain=plain), config, 4) is None
    fewer = predictions(tmp_path, 'fewer', images=IMAGES[:-1])
    assert read_classifications(dict(teacher=fewer, plain=plain), config, 4) is None
    other = predictions(tmp_path, 'other', images=[(name, 1 - label) for name, label in IMAGES])
    assert read_classifications(dict(teacher=other, plain=plain), config, 4) is None
    assert read_classifications(dict(plain=fewer), config, 4) is None


def test_other_images_are_other_data(config, tmp_path):
    before = data_hashes(config)
    assert before.keys() == {'train_dataloader.images', 'test_dataloader.images'} and data_hashes(config) == before
    folder = tmp_path / 'images' / 'train'
    (folder / 'cat' / '0.png').rename(folder / 'dog' / '9.png')
    moved = data_hashes(config)
    assert moved['train_dataloader.images'] != before['train_dataloader.images'], 'an image of another class'
    assert moved['test_dataloader.images'] == before['test_dataloader.images']
    write(tmp_path / 'images' / 'val' / 'cat' / '0.png', np.zeros((40, 50)))
    assert data_hashes(config)['test_dataloader.images'] != before['test_dataloader.images'], 'an image of another size'


@pytest.mark.parametrize('key', ['images', 'labels'])
@pytest.mark.parametrize('spelling', ['{}.npy', '{}.npz', '{}.npz:x_train'])
def test_other_arrays_are_other_data(tmp_path, key, spelling):
    value = str(tmp_path / spelling.format('array'))
    config = Config(dict(train_dataloader=dict(dataset=dict(type='ArrayDataset', **{key: value}))))
    hashes = []
    for content in (0, 1):
        save = np.save if spelling.endswith('npy') else np.savez
        save(value.partition(':')[0], np.full(8, content))
        hashes.append(data_hashes(config))
    assert hashes[0].keys() == {f'train_dataloader.{key}'} and hashes[0] != hashes[1], 'of the same size'
