"""The bank of adapters: real parameters that no state dict shows."""

import copy

import pytest
import torch
from torch import nn

from kd_plugins.distiller import AdapterBank
from kd_plugins.errors import DistillError


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.bank = AdapterBank()
        self.bank.add_module('neck', nn.ModuleList([nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)]))


HIDDEN = {
    'neck.0.weight',
    'neck.0.bias',
    'neck.1.weight',
    'neck.1.bias',
    'neck.1.running_mean',
    'neck.1.running_var',
    'neck.1.num_batches_tracked',
}


@pytest.mark.parametrize('wrap', [lambda m: m, copy.deepcopy, lambda m: nn.Sequential(copy.deepcopy(m))])
def test_hidden_from_state_dicts_of_model_copy_and_wrapper(wrap):
    model = wrap(Student())
    assert {k.split('.')[-2] for k in model.state_dict()} == {'fc'}
    assert len([n for n, _ in model.named_parameters() if 'bank' in n]) == 4


def test_a_strict_load_is_complete_without_them_and_leaves_them():
    one, other = Student(), Student()
    before = other.bank.export_state()
    result = other.load_state_dict(one.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(other.fc.weight, one.fc.weight)
    assert all(torch.equal(before[k], v) for k, v in other.bank.export_state().items())


def test_a_strict_load_still_finds_other_mistakes():
    state = Student().state_dict()
    del state['fc.bias']
    with pytest.raises(RuntimeError, match=r'fc\.bias'):
        Student().load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match='extra'):
        Student().load_state_dict({**Student().state_dict(), 'bank.extra': torch.ones(1)}, strict=True)


def test_export_and_import():
    one, other = Student(), Student()
    one.bank.neck[1].running_mean.add_(3)
    state = one.bank.export_state()
    assert set(state) == HIDDEN
    other.bank.import_state(state, 'a file')
    assert all(torch.equal(state[k], v) for k, v in other.bank.export_state().items())
    state['neck.0.weight'].add_(1)
    assert not torch.equal(state['neck.0.weight'], one.bank.neck[0].weight), 'an export must be a copy'


@pytest.mark.parametrize(
    'edit',
    [
        lambda s: s.pop('neck.0.bias'),
        lambda s: s.update(x=torch.ones(1)),
        lambda s: s.update({'neck.0.bias': torch.ones(7)}),
    ],
)
def test_other_adapters_are_refused(edit):
    state = Student().bank.export_state()
    edit(state)
    with pytest.raises(DistillError, match='saved in a file are not those of this config'):
        Student().bank.import_state(state, 'a file')
