"""A feature of any kind becomes class logits."""

import pytest
import torch
from torch import nn

from kd_plugins.adapters import LogitProjector, describe_adapter
from kd_plugins.errors import DistillError

KINDS = [(2, 6, 4, 3), (2, 12, 6), (2, 6)]


@pytest.mark.parametrize('shape', KINDS)
def test_it_is_built_for_shapes(shape):
    projector = LogitProjector().for_shapes(shape, (2, 10))
    found = projector(torch.randn(shape), torch.randn(2, 10))
    assert found.shape == (2, 10)
    found.sum().backward()
    assert all(p.grad is not None for p in projector.parameters())
    count = 6 * 2 + (6 * 6 + 6) + (6 * 10 + 10)
    assert sum(p.numel() for p in projector.parameters()) == count
    assert describe_adapter(projector, shape, (2, 10)) == f'projector 6->6->10 logits ({count} params)'


def test_layouts_of_one_feature_give_the_same_logits():
    torch.manual_seed(0)
    projector, maps = LogitProjector(6, 10), torch.randn(2, 6, 4, 3)
    tokens = maps.flatten(2).transpose(1, 2)
    assert torch.allclose(projector(maps, None), projector(tokens, None), atol=1e-6)
    constant = maps[:, :, :1, :1].expand_as(maps)
    assert torch.allclose(projector(constant, None), projector(maps[:, :, 0, 0], None), atol=1e-6)


def test_all_tokens_count():
    torch.manual_seed(0)
    projector, tokens = LogitProjector(6, 10), torch.randn(2, 5, 6)
    by_hand = torch.stack([projector(token, None) for token in tokens.unbind(1)]).mean(0)
    # The last layer is linear, so the mean may come before or behind it.
    assert torch.allclose(projector(tokens, None), by_hand, atol=1e-6)


def test_scale_and_offset_of_the_features_do_not_matter():
    """Residual streams grow with depth; a projector at any depth starts from the same logits."""
    torch.manual_seed(0)
    projector, maps = LogitProjector(6, 10), torch.randn(2, 6, 4, 3)
    assert torch.allclose(projector(maps, None), projector(100 * maps + 7, None), atol=1e-3)


def test_given_numbers_stay():
    projector = LogitProjector(classes=3, hidden=8).for_shapes((2, 6), (2, 10))
    assert projector(torch.randn(2, 6), None).shape == (2, 3)
    assert projector.hidden.out_features == 8


def test_every_call_of_for_shapes_is_a_new_start():
    first = LogitProjector()
    one, two = first.for_shapes((2, 6), (2, 10)), first.for_shapes((2, 4), (2, 10))
    assert one.hidden.in_features == 6 and two.hidden.in_features == 4 and not list(first.parameters())


def test_half_precision_features_are_taken():
    projector = LogitProjector(6, 10)
    assert projector(torch.randn(2, 6, 4, 3).half(), None).dtype == torch.float32


def test_it_can_learn_what_is_not_linear():
    """Whether two numbers have the same sign: no linear reading of them tells that."""
    torch.manual_seed(0)
    numbers = torch.randn(256, 2, 1, 1)
    features = torch.cat([numbers, -numbers], 1)  # with a mean of 0, so that the norm leaves the signs
    target = (numbers.prod(1) > 0).long().flatten()
    projector = LogitProjector(4, 2, hidden=32)
    optimizer = torch.optim.Adam(projector.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(projector(features, None), target).backward()
        optimizer.step()
    assert (projector(features, None).argmax(-1) == target).float().mean() > 0.9


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        (lambda: LogitProjector(0), 'in_features must be an integer >= 1, got 0'),
        (lambda: LogitProjector(hidden=True), 'hidden must be an integer >= 1, got True'),
        (lambda: LogitProjector()(torch.zeros(2, 6), None), 'not built.*for_shapes'),
        (lambda: LogitProjector().for_shapes((2, 6, 1, 1, 1), (2, 10)), 'takes maps, tokens or vectors'),
        (lambda: LogitProjector().for_shapes((2, 6), (2, 10, 7, 7)), r"\(2, 10, 7, 7\); tap its 'logits'"),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(DistillError, match=words):
        call()
