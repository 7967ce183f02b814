"""Label maps are read as mmseg's metric writes them, ground truth as its data sets read it."""

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from kd_plugins.lab.comparison.mm.experiment import data_hashes
from kd_plugins.lab.comparison.mm.segmentations import read_segmentations
from kd_plugins.lab.comparison.segmentations import IGNORED

pytest.importorskip('mmseg')

TRUTH = np.array([[0, 1, 2], [255, 1, 0]], np.uint8)


@pytest.fixture
def config(tmp_path):
    for i in range(5):
        write(tmp_path / 'img' / f'{i}.png', np.full((2, 3, 3), i))
        write(tmp_path / 'ann' / f'{i}.png', TRUTH)
        for model in ('plain', 'teacher'):
            write(tmp_path / model / f'{i}.png', np.full((2, 3), i % 2))
    return Config(
        dict(
            default_scope='mmseg',
            test_dataloader=dict(
                dataset=dict(
                    type='BaseSegDataset',
                    data_root=str(tmp_path),
                    data_prefix=dict(img_path='img', seg_map_path='ann'),
                    img_suffix='.png',
                    metainfo=dict(classes=('a', 'b', 'c'), palette=[[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
                    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
                )
            ),
        )
    )


def write(path, values):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def folders(root):
    return {model: root / model for model in ('teacher', 'plain')}


def test_label_maps(config, tmp_path):
    found = read_segmentations(folders(tmp_path), config, 255, 2)
    assert found.images == ['1', '3'] and found.files['1'] == str(tmp_path / 'img' / '1.png')
    assert found.truth['1'].tolist() == [[0, 1, 2], [IGNORED, 1, 0]]
    assert list(found.found) == ['teacher', 'plain'] and (found.found['plain']['3'] == 1).all()
    assert found.classes == ('a', 'b', 'c') and found.palette[1] == [4, 5, 6]


def test_the_metric_says_what_is_ignored(config, tmp_path):
    truth = read_segmentations(folders(tmp_path), config, 2, 1).truth['2']
    assert truth.tolist() == [[0, 1, IGNORED], [IGNORED, 1, 0]]


def test_data_sets_without_a_background_class(config, tmp_path):
    config.test_dataloader.dataset.reduce_zero_label = True
    found = read_segmentations(folders(tmp_path), config, 255, 2)
    assert found.truth['1'].tolist() == [[IGNORED, 0, 1], [IGNORED, 0, IGNORED]]
    assert (found.found['plain']['1'] == 0).all(), 'the metric writes class + 1 there'


def test_no_picture_without_predictions(config, tmp_path):
    assert read_segmentations({'plain': tmp_path / 'nowhere'}, config, 255, 2) is None


def test_other_label_maps_are_other_data(config, tmp_path):
    before = data_hashes(config)
    assert data_hashes(config) == before
    write(tmp_path / 'ann' / '0.png', np.zeros((40, 50)))
    after = data_hashes(config)
    assert before.keys() == after.keys() == {'test_dataloader.label_maps'} and before != after
