"""What adapters say of themselves: ours by inheritance, a user's own by what they have."""

import inspect

import pytest
import torch
from torch import nn

import kd_plugins.adapters as adapters
from kd_plugins.adapters import Adapter, AdapterChain, LogitProjector, adapt, auto_adapter, describe_adapter, traits_of

SHAPES = (1, 4, 2, 2), (1, 6, 2, 2)
OURS = {name: a for name in adapters.__all__ if isinstance(a := getattr(adapters, name), type)}


class Silent(nn.Module):
    """What most users write."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, student, teacher):
        return student * self.scale


class Says(Silent):
    """Everything that `Adapter` has, without being one."""

    needs_image_size = True

    def for_shapes(self, student_shape, teacher_shape):
        return nn.Conv2d(student_shape[1], teacher_shape[1], 1)

    def describe(self, student_shape, teacher_shape):
        return f'mine {student_shape[1]}->{teacher_shape[1]}'

    def forward(self, student, teacher, image_size):
        return student + image_size[1]


class Mine(Silent, Adapter):
    """An adapter by inheritance that says nothing more."""


@pytest.mark.parametrize('adapter', [Silent(), Mine()])
def test_what_is_not_said_has_a_default(adapter):
    traits = traits_of(adapter)
    assert traits.needs_image_size is False
    assert traits.for_shapes(*SHAPES) is adapter
    assert traits.describe(*SHAPES) == describe_adapter(adapter, *SHAPES) == f'{type(adapter).__name__} (1 params)'
    student = torch.ones(1, 4, 2, 2)
    assert torch.equal(adapt(adapter, student, None), 3 * student)
    assert torch.equal(adapt(adapter, student, None, (32, 48)), 3 * student), 'not handed what it does not take'


@pytest.mark.parametrize('base', [nn.Module, Adapter])
def test_what_is_said_is_heard(base):
    adapter = type('Says', (Says, base), {})()
    traits = traits_of(adapter)
    assert traits.needs_image_size
    assert traits.for_shapes(*SHAPES).out_channels == 6
    assert describe_adapter(adapter, *SHAPES) == 'mine 4->6'
    assert adapt(adapter, torch.zeros(1), None, (32, 48)) == 48


def test_a_module_of_a_user_is_called_and_trained_as_it_is():
    """No wrapper: neither its class nor the names of its parameters change."""
    adapter = Silent()
    assert traits_of(adapter).for_shapes(*SHAPES) is adapter
    assert list(nn.ModuleList([traits_of(adapter).for_shapes(*SHAPES)]).state_dict()) == ['0.scale']
    adapt(adapter, torch.ones(2), None).sum().backward()
    assert adapter.scale.grad == 2


def test_modules_of_torch_are_adapters():
    shape = traits_of(nn.Identity()).for_shapes(*SHAPES)
    assert isinstance(shape, nn.Identity) and describe_adapter(nn.ReLU(), *SHAPES) == 'ReLU (0 params)'


@pytest.mark.parametrize('adapter', OURS.values(), ids=OURS)
def test_ours_inherit_and_describe_themselves(adapter):
    assert issubclass(adapter, Adapter)
    assert adapter.describe is not Adapter.describe, 'says in words what it does'


def test_only_the_projector_is_built_for_shapes():
    assert {n for n, a in OURS.items() if a.for_shapes is not Adapter.for_shapes} == {'LogitProjector'}
    empty = LogitProjector()
    built = traits_of(empty).for_shapes((2, 6, 4, 3), (2, 10))
    assert built is not empty and built.built and not empty.built


def test_a_chain_says_what_its_members_say():
    chain = AdapterChain(Silent(), Says())
    assert traits_of(chain).needs_image_size and not traits_of(AdapterChain(Silent())).needs_image_size
    assert describe_adapter(chain, *SHAPES) == 'Silent (1 params), mine 4->6'
    assert adapt(chain, torch.ones(1), None, (32, 48)) == 51
    assert traits_of(chain).for_shapes(*SHAPES) is chain
    assert list(chain.state_dict()) == ['0.scale', '1.scale'] and list(chain[1:].state_dict()) == ['1.scale']


def test_no_adapter_is_none():
    assert describe_adapter(None, *SHAPES) == 'none'


def test_the_automatic_one_has_no_option_without_effect():
    """Tokens in front are for `as_map`, before an adapter is chosen."""
    assert list(inspect.signature(auto_adapter).parameters) == ['student_shape', 'teacher_shape', 'norm', 'channels']
