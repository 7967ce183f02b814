"""The bank of adapters: in no module tree but its own, and which of them take part."""

import pytest
import torch
from torch import nn

from kd_plugins.distiller import AdapterBank
from kd_plugins.errors import DistillError


def bank():
    made = AdapterBank()
    made.add_module('neck', nn.ModuleList([nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)]))
    made.add_module('head', nn.Linear(2, 2, bias=False))
    return made


NECK = ['neck.0.weight', 'neck.0.bias', 'neck.1.weight', 'neck.1.bias']


def test_what_is_trained():
    assert not AdapterBank().trainable()
    one = bank()
    assert list(one.trainable()) == [*NECK, 'head.weight']
    one.head.requires_grad_(False)
    assert list(one.trainable()) == NECK


def test_marked_terms_add_up_until_they_are_forgotten():
    one = bank()
    assert list(one.marked_parameters()) == [*NECK, 'head.weight'], 'nobody said which: all'
    one.mark([])
    assert not one.marked_parameters()
    one.mark(['head'])
    one.mark([])
    assert list(one.marked_parameters()) == ['head.weight']
    one.mark(['neck'])
    assert list(one.marked_parameters()) == [*NECK, 'head.weight']
    one.unmark()
    assert not one.marked_parameters()


def test_export_and_import():
    one, other = bank(), bank()
    one.neck[1].running_mean.add_(3)
    state = one.export_state()
    assert set(state) == {
        *NECK,
        'neck.1.running_mean',
        'neck.1.running_var',
        'neck.1.num_batches_tracked',
        'head.weight',
    }
    other.import_state(state, 'a file')
    assert all(torch.equal(state[k], v) for k, v in other.export_state().items())
    state['neck.0.weight'].add_(1)
    assert not torch.equal(state['neck.0.weight'], one.neck[0].weight), 'an export must be a copy'


@pytest.mark.parametrize(
    'edit',
    [
        lambda s: s.pop('neck.0.bias'),
        lambda s: s.update(x=torch.ones(1)),
        lambda s: s.update({'neck.0.bias': torch.ones(7)}),
    ],
)
def test_other_adapters_are_refused(edit):
    state = bank().export_state()
    edit(state)
    with pytest.raises(DistillError, match='saved in a file are not those of this config'):
        bank().import_state(state, 'a file')
