"""Labels of a batch: stacked, padding marked, nothing of the batch changed."""

from types import SimpleNamespace

import torch

from kd_plugins.mm.targets import labels


def sample(values, **meta):
    return SimpleNamespace(gt_sem_seg=SimpleNamespace(data=torch.tensor([values])), metainfo=meta)


def test_label_maps_are_stacked():
    found = labels(torch.zeros(2, 3, 2, 2), [sample([[0, 1], [2, 255]]), sample([[3, 3], [3, 3]])])
    assert found.tolist() == [[[0, 1], [2, 255]], [[3, 3], [3, 3]]]


def test_padding_is_marked_on_every_side():
    """(left, right, top, bottom), as mmseg notes it."""
    batch = [sample([[7] * 4] * 3, padding_size=(1, 2, 0, 1)), sample([[7] * 4] * 3, padding_size=(0, 0, 1, 0))]
    found = labels(torch.zeros(2, 3, 3, 4), batch)
    assert found.tolist() == [
        [[255, 7, 255, 255], [255, 7, 255, 255], [255] * 4],
        [[255] * 4, [7] * 4, [7] * 4],
    ]
    assert (batch[0].gt_sem_seg.data == 7).all()


def test_without_samples_every_pixel_has_a_label():
    found = labels(torch.zeros(2, 3, 4, 5), None)
    assert found.shape == (2, 4, 5) and found.dtype == torch.long and not found.any()


def test_samples_without_label_maps_give_none():
    assert labels(torch.zeros(1, 3, 2, 2), [SimpleNamespace(metainfo={})]) is None
    assert labels(torch.zeros(0, 3, 2, 2), []) is None
