"""A long-tailed part of a balanced data set: many images of the first classes, few of the last."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from kd_plugins.errors import DistillError
from kd_plugins.registry import DATASETS


@DATASETS.register_module()
class LongTail(Dataset):
    r"""Keeps fewer and fewer images from class to class, down to one ``ratio``-th of the first.

    .. math:: n_c = \max(1, \lfloor n \, r^{-c / (C - 1)} \rceil), \quad n = \min_c N_c

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019, arXiv 1901.05555), section 5.1:
    long-tailed CIFAR. It wraps a training set, e.g. ``dict(type='kd_plugins.LongTail', ratio=100,
    dataset=dict(type='kd_plugins.ArrayDataset', ...))``; validate on all images.

    Args:
        dataset: The data set with one class per image, or its config.
        ratio: Images of the first class per image of the last, ``r`` >= 1.
        seed: Which images of a class are kept.

    Attributes:
        indices: Those of the images that are kept, ascending.

    Raises:
        DistillError: An image has several classes, a class has no image, or an option is out of range.
    """

    def __init__(self, dataset: Any, ratio: float = 100, seed: int = 0) -> None:
        if not isinstance(ratio, Real) or isinstance(ratio, bool) or not 1 <= ratio < float('inf'):
            raise DistillError(f'LongTail: ratio must be a number >= 1, got {ratio!r}.')
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise DistillError(f'LongTail: seed must be a whole number >= 0, got {seed!r}.')
        self.dataset: Any = DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset
        self.full_init()
        found = [self.dataset.get_data_info(i).get('gt_label') for i in range(len(self.dataset))]
        if any(not isinstance(label, (int, np.integer)) for label in found):
            raise DistillError('LongTail: it takes a data set with one class per image.')
        labels, names = np.array(found), self.metainfo['classes']
        pools = [np.flatnonzero(labels == c) for c in range(len(names))]
        for name, pool in zip(names, pools, strict=True):
            if not len(pool):
                raise DistillError(f'LongTail: class {name!r} has no image.')
        smallest, rng = min(map(len, pools)), np.random.default_rng(seed)
        kept = [
            rng.permutation(pool)[: max(1, round(smallest * float(ratio) ** (-c / max(len(pools) - 1, 1))))]
            for c, pool in enumerate(pools)
        ]
        self.indices: np.ndarray = np.sort(np.concatenate(kept))

    @property
    def metainfo(self) -> dict[str, Any]:
        """That of the data set."""
        return dict(self.dataset.metainfo)

    def full_init(self) -> None:
        """As in MMEngine's wrappers."""
        self.dataset.full_init()

    def get_data_info(self, index: int) -> dict[str, Any]:
        """What is known of an image without reading it, see the data set."""
        return {**self.dataset.get_data_info(int(self.indices[index])), 'sample_idx': index}

    def get_cat_ids(self, index: int) -> list[int]:
        """The classes of an image."""
        return self.dataset.get_cat_ids(int(self.indices[index]))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]
