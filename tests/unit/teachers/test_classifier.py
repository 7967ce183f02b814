"""How many classes a teacher has is told by its file, when that is all in which the file differs."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.teachers.classifier import load_weights


def network(number=None, width=6, token=False):
    """As timm's: a stem, and one head, or two."""
    number = 10 if number is None else number
    heads = dict(head=nn.Linear(width, number), **({'head_dist': nn.Linear(width, number)} if token else {}))
    return nn.Sequential(OrderedDict(stem=nn.Linear(3, width), **heads))


def load(tmp_path, stored, create=network, **options):
    torch.save(dict(state_dict=stored.state_dict(), meta={}), tmp_path / 'x.pth')
    net, number, *_ = load_weights(create, dict(checkpoint=str(tmp_path / 'x.pth'), **options), 'timm')
    for key, value in stored.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=0, atol=0)
    return number


@pytest.mark.parametrize('token', [False, True])
def test_the_file_says_how_many(tmp_path, token):
    assert load(tmp_path, network(3, token=token), lambda n: network(n, token=token)) == 3


def test_nothing_is_read_from_a_file_that_fits(tmp_path):
    assert load(tmp_path, network()) is None


def test_options_come_first(tmp_path):
    assert load(tmp_path, network(3), num_classes=3) == 3
    with pytest.raises(DistillError, match=r'head\.weight is \(3, 6\) in the file and \(4, 6\) in the model'):
        load(tmp_path, network(3), classes=['a', 'b', 'c', 'd'])


@pytest.mark.parametrize(
    'stored',
    [
        network(3, width=8),
        nn.Sequential(OrderedDict(stem=nn.Linear(3, 6), head=nn.Linear(6, 3), head_dist=nn.Linear(6, 4))),
    ],
    ids=['another width', 'two numbers'],
)
def test_other_differences_are_refused(tmp_path, stored):
    with pytest.raises(DistillError, match='of another shape'):
        load(tmp_path, stored, lambda n: network(n, token='head_dist' in dict(stored.named_children())))
