"""Networks that are built only to be filled."""

import copy

import pytest
import torch
from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.teachers import load_strictly, unfilled


class Net(nn.Module):
    """All the ways in which weights are drawn, and what is none."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.position = nn.Parameter(torch.randn(1, 4))
        self.position.data.mul_(0.5)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.kaiming_normal_(self.conv.weight)
        self.register_buffer('table', torch.empty(5).uniform_(), persistent=False)


def drawn(seed=0):
    torch.manual_seed(seed)
    return Net()


def test_filled_it_is_the_network_that_was_saved():
    wanted = drawn()
    torch.manual_seed(1)
    with unfilled():
        net = Net()
    assert net.conv.weight.isnan().all() and net.linear.weight.isnan().all() and net.linear.bias.isnan().all()
    # Of what no file holds nothing may be left out.
    assert 0 <= net.table.min() < net.table.max() <= 1 and net.norm.weight.eq(1).all()
    assert net.position.isfinite().all()
    load_strictly(net, wanted.state_dict(), 'x.pth')
    assert all(torch.equal(v, wanted.state_dict()[k]) for k, v in net.state_dict().items())
    assert Net().conv.weight.isfinite().all()


def test_what_a_model_keeps_from_its_file_is_never_taken_for_a_weight():
    class Hidden(Net):
        def state_dict(self, *args, **kwargs):
            found = super().state_dict(*args, **kwargs)
            found.pop('conv.weight')
            return found

        def load_state_dict(self, state, strict=True, **options):
            return super().load_state_dict({**state, 'conv.weight': self.conv.weight}, strict, **options)

    with unfilled():
        net = Hidden()
    load_strictly(net, copy.deepcopy(net).state_dict(), 'x.pth')
    assert net.conv(torch.ones(1, 3, 4, 4)).isnan().any()


def test_a_network_of_another_file_is_refused_as_ever():
    with unfilled():
        net = Net()
    state = drawn().state_dict()
    del state['linear.weight']
    with pytest.raises(DistillError, match=r'linear\.weight'):
        load_strictly(net, state, 'x.pth')
