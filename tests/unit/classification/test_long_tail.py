"""Long-tailed parts of data sets, and how many images a run has of each class."""

import numpy as np
import pytest
import torch
from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset

from kd_plugins.classification.datasets import ArrayDataset
from kd_plugins.classification.long_tail import LongTail
from kd_plugins.errors import DistillError
from kd_plugins.mm.host import image_counts

CLASSES = ('a', 'b', 'c', 'd', 'e')
#: 100 images of every class and 7 more of the last; each has its own number as its colour.
LABELS = np.concatenate([np.arange(500) % 5, [4] * 7])
IMAGES = np.zeros((507, 2, 2, 3), np.uint8)
IMAGES[:, 0, 0, 0], IMAGES[:, 0, 0, 1] = np.arange(507) % 256, np.arange(507) // 256


def balanced(labels=LABELS, images=IMAGES):
    return ArrayDataset(images, labels, classes=CLASSES)


@pytest.mark.parametrize('ratio', [1, 10, 100, 4.5])
def test_counts_fall_exponentially(ratio):
    data = LongTail(balanced(), ratio=ratio)
    expected = [max(1, round(100 * ratio ** (-c / 4))) for c in range(5)]
    assert image_counts(data, 5) == expected and len(data) == sum(expected)
    assert expected[0] == 100 and expected[-1] == max(1, round(100 / ratio))


def test_images_keep_their_labels():
    data = LongTail(balanced(), ratio=20)
    assert data.metainfo == dict(classes=CLASSES)
    for i in (0, 3, len(data) - 1):
        item, index = data[i], int(data.indices[i])
        assert item['inputs'][:2, 0, 0].tolist() == [index % 256, index // 256]
        assert item['data_samples'].gt_label == LABELS[index] == data.get_data_info(i)['gt_label']
        assert data.get_cat_ids(i) == [LABELS[index]] and data.get_data_info(i)['sample_idx'] == i


def test_which_images_are_kept_is_for_the_seed_to_say():
    first, again, other = (LongTail(balanced(), ratio=20, seed=s).indices.tolist() for s in (0, 0, 1))
    assert first == again != other and first == sorted(set(first))


def test_it_is_built_from_a_config(tmp_path):
    np.savez(tmp_path / 'd.npz', images=IMAGES, labels=LABELS)
    wrapped = dict(type='kd_plugins.ArrayDataset', images=f'{tmp_path}/d.npz', labels=f'{tmp_path}/d.npz')
    assert image_counts(LongTail(wrapped, ratio=10), 5) == [100, 56, 32, 18, 10]


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(ratio=0.5), 'ratio must be a number >= 1'),
        (dict(ratio=True), 'ratio must be a number >= 1'),
        (dict(ratio='many'), 'ratio must be a number >= 1'),
        (dict(ratio=float('inf')), 'ratio must be a number >= 1'),
        (dict(seed=-1), 'seed must be a whole number >= 0'),
        (dict(dataset=balanced(np.minimum(LABELS, 3))), "class 'e' has no image"),
        (dict(dataset=balanced(np.eye(5, dtype=np.uint8)[LABELS])), 'one class per image'),
    ],
)
def test_refused(options, message):
    with pytest.raises(DistillError, match=message):
        LongTail(**{'dataset': balanced(), **options})


def test_counts_of_wrapped_data_sets(tmp_path):
    np.savez(tmp_path / 'd.npz', images=IMAGES, labels=LABELS)
    wrapped = dict(type='kd_plugins.ArrayDataset', images=f'{tmp_path}/d.npz', labels=f'{tmp_path}/d.npz')
    tail = dict(type='kd_plugins.LongTail', ratio=100, dataset=wrapped)
    counts = image_counts(LongTail(balanced(), ratio=100), 5)
    assert image_counts(RepeatDataset(tail, times=3), 5) == [3 * n for n in counts]
    both = [n + m for n, m in zip(counts, [100] * 4 + [107], strict=True)]
    assert image_counts(ConcatDataset([tail, wrapped]), 5) == both
    often = image_counts(ClassBalancedDataset(tail, oversample_thr=0.5), 5)
    assert often[-1] > counts[-1]


def test_counts_of_what_tells_no_class():
    assert image_counts(torch.utils.data.TensorDataset(torch.zeros(3)), 5) is None
    assert image_counts(balanced(), 3) is None, 'classes beyond the head'
