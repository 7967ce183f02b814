"""The teacher: frozen, apart from everything, strictly loaded; random generators untouched."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import DistillError
from kd_plugins.teachers import FrozenTeacher, load_strictly


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))


def teacher(model=None):
    return FrozenTeacher(
        model or network(), lambda m, x, samples, modules: m(x), lambda x, samples: x, name='tiny', checkpoint='x.pth'
    )


def test_frozen_in_evaluation_mode_and_repeatable():
    model = network().train()
    one = teacher(model)
    before = one.fingerprint()
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    x = torch.randn(4, 3, 8, 8)
    first, second = (one.outputs(x, None, ['3']).call('3').output for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert one.fingerprint() == before


def test_outputs_can_be_used_in_training():
    """Inference tensors could not be saved for backward."""
    output = teacher().outputs(torch.randn(1, 3, 4, 4), None, ['3']).call('3').output
    weight = torch.ones((), requires_grad=True)
    (weight * output).sum().backward()
    assert weight.grad == output.sum()


@pytest.mark.parametrize('change', ['weight', 'statistic'])
def test_fingerprint_sees_every_change(change):
    one = teacher()
    before = one.fingerprint()
    with torch.no_grad():
        tensor = one.model[0].weight if change == 'weight' else one.model[1].running_mean
        tensor.view(-1)[0] += 1e-6
    assert one.fingerprint() != before


def test_copies_share_it_and_pickles_leave_it_out():
    one = teacher()
    holder = {'teacher': one, 'weight': torch.ones(2)}
    assert copy.deepcopy(holder)['teacher'] is one
    assert copy.copy(one) is one
    stored = pickle.dumps(holder)
    assert pickle.loads(stored)['teacher'] is None
    assert b'Conv2d' not in stored


def test_it_is_not_a_module_and_hides_in_one():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.teacher = teacher()

    student = Student()
    assert [n for n, _ in student.named_parameters()] == ['fc.weight', 'fc.bias']
    assert list(student.state_dict()) == ['fc.weight', 'fc.bias']
    student.train()
    assert not student.teacher.model.training


def test_follows_the_dtype_of_its_inputs():
    one = teacher()
    one.to(torch.zeros(1, dtype=torch.float64))
    assert one.dtype == torch.float64
    one.to(torch.zeros(1, dtype=torch.uint8))
    assert one.dtype == torch.float64


def test_complete_load():
    source, target = network(), network()
    with torch.no_grad():
        source[0].weight.add_(1)
    report = load_strictly(target, source.state_dict(), 'x.pth')
    assert not report.missing and not report.unexpected
    loaded = target.state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in source.state_dict().items())


def test_missing_step_counter_of_old_checkpoints_is_accepted():
    state = {k: v for k, v in network().state_dict().items() if not k.endswith('num_batches_tracked')}
    load_strictly(network(), state, 'x.pth')


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda s: s.pop('0.weight'), r'1 of 9 keys missing \(0\.weight\)'),
        (lambda s: s.update({'extra.weight': torch.ones(1)}), r'1 of 10 keys unexpected \(extra\.weight\)'),
        (lambda s: s.update({'0.weight': torch.ones(5, 3, 1, 1)}), r'of another shape \(0\.weight is \(5, 3, 1, 1\)'),
        (lambda s: s.pop('1.running_mean'), r'missing \(1\.running_mean\)'),
    ],
)
def test_incomplete_loads_are_refused(edit, message):
    state = dict(network().state_dict())
    edit(state)
    target = network()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(DistillError, match=message):
        load_strictly(target, state, 'x.pth')
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items()), 'half a load took place'


def test_another_architecture_is_named_as_such():
    state = {f'encoder.{k}': v for k, v in network().state_dict().items()}
    with pytest.raises(DistillError, match='belongs to another architecture'):
        load_strictly(network(), state, 'x.pth')


def test_deviations_allowed_by_name_are_reported():
    state = dict(network().state_dict())
    del state['3.weight'], state['3.bias']
    state['ema.0.weight'] = torch.ones(1)
    with pytest.raises(DistillError):
        load_strictly(network(), state, 'x.pth', allow_missing=['3'])
    report = load_strictly(network(), state, 'x.pth', allow_missing=['3'], allow_unexpected=['ema'])
    assert set(report.missing) == {'3.weight', '3.bias'} and report.unexpected == ['ema.0.weight']
    with pytest.raises(DistillError):
        load_strictly(network(), state, 'x.pth', allow_missing=['3.w'], allow_unexpected=['ema'])


def test_untouched_rng():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    with untouched_rng():
        assert draw() == expected
        draw()
    assert draw() == expected
    seed()
    with pytest.raises(KeyError), untouched_rng():
        draw()
        torch.manual_seed(5)
        raise KeyError
    assert draw() == expected
