"""Class names and pipelines through every wrapper of a data set."""

import copy

import pytest
import torch
from mmdet.datasets import ConcatDataset as DetConcatDataset
from mmdet.datasets import MultiImageMixDataset
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset

from kd_plugins.classification.datasets import ArrayDataset
from kd_plugins.errors import DistillError
from kd_plugins.mm.data import class_names, pipelines

NAMES = ('cat', 'dog')


class Pictures(BaseDataset):
    def load_data_list(self):
        return [dict(instances=[dict(bbox_label=0)], img_path='a.png')] * 3

    def get_cat_ids(self, index):
        return [0]


def pictures(names=NAMES, pipeline=(), **meta):
    meta = dict(meta) if names is None else dict(classes=names, **meta)
    return Pictures(metainfo=meta, pipeline=list(pipeline))


def step(results):
    return results


WRAPPERS = {
    'none': lambda d: d,
    'repeated': lambda d: RepeatDataset(d, 2),
    'balanced': lambda d: ClassBalancedDataset(d, 0.5),
    'concatenated': lambda d: ConcatDataset([d, copy.deepcopy(d)]),
    'mixed': lambda d: MultiImageMixDataset(d, [dict(type='RandomFlip', prob=0.5)]),
    "torch's subset": lambda d: torch.utils.data.Subset(d, [0, 1]),
    "torch's concatenation": lambda d: torch.utils.data.ConcatDataset([d, d]),
}


@pytest.mark.parametrize('kind', WRAPPERS)
def test_class_names_behind_a_wrapper(kind):
    assert class_names(WRAPPERS[kind](pictures())) == NAMES
    assert class_names(WRAPPERS[kind](pictures(None))) is None


def test_class_names_of_parts_that_differ_otherwise():
    """mmdet's `metainfo` is a list then."""
    joined = DetConcatDataset([pictures(palette=[(1, 2, 3)]), pictures()])
    assert isinstance(joined.metainfo, list) and class_names(joined) == NAMES
    # One that says nothing agrees (mmdet wants it behind the others).
    assert class_names(DetConcatDataset([pictures(), pictures(None)])) == NAMES


def test_parts_of_other_classes_are_named():
    joined = DetConcatDataset([pictures(), pictures(('dog', 'cat')), pictures(('a', 'b', 'c', 'd'))])
    with pytest.raises(DistillError, match=r'Pictures has 2 \(cat, dog\), Pictures has 2 \(dog, cat\);') as error:
        class_names(joined)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize('metainfo', [None, dict(classes='cat'), [dict(classes=NAMES)]])
def test_data_sets_that_name_no_classes(metainfo):
    data = torch.utils.data.TensorDataset(torch.zeros(2))
    data.metainfo = metainfo
    assert class_names(data) is None


def test_ours():
    data = ArrayDataset(torch.zeros(4, 8, 8, 3, dtype=torch.uint8).numpy(), [0, 1, 0, 1], NAMES)
    assert class_names(RepeatDataset(dict(type='kd_plugins.ArrayDataset', images=data._images, labels=[0, 1, 1, 0]), 2))
    assert class_names(data) == NAMES and pipelines(data) == [[]]


def test_pipelines_behind_wrappers():
    flip = dict(type='RandomFlip', prob=0.5)
    found = pipelines(MultiImageMixDataset(pictures(pipeline=[step]), [flip]))
    ((own, wrapped),) = found
    assert own is step and type(wrapped).__name__ == 'RandomFlip'
    assert pipelines(ConcatDataset([pictures(pipeline=[step]), pictures()])) == [[step], []]
    assert pipelines(torch.utils.data.TensorDataset(torch.zeros(2))) == [[]]
    config = Config(dict(data=dict(type='X', pipeline=[flip], datasets=[dict(dataset=dict(pipeline=[flip])), dict()])))
    assert pipelines(config.data) == [[flip, flip], [flip]]
