"""Attention probabilities become maps of where in the image they go."""

import pytest
import torch

from kd_plugins.adapters import attention_map
from kd_plugins.errors import DistillError


def probabilities(queries, tokens, heads=3):
    torch.manual_seed(0)
    return torch.randn(2, heads, queries, tokens).softmax(-1)


@pytest.mark.parametrize(
    ('size', 'grid', 'prefix'),
    [((224, 224), (14, 14), 1), ((96, 160), (6, 10), 2), ((70, 112), (5, 8), 5), ((32, 32), (8, 8), 1)],
)
def test_what_the_class_token_attends_to(size, grid, prefix):
    tokens = grid[0] * grid[1] + prefix
    attention = probabilities(tokens, tokens)
    found = attention_map(attention, size)
    assert found.shape == (2, 3, *grid)
    for row, column in ((0, grid[1] - 1), (grid[0] - 1, 1)):
        assert torch.equal(found[:, :, row, column], attention[:, :, 0, prefix + row * grid[1] + column])


@pytest.mark.parametrize('prefix', [0, 4])
def test_without_a_class_token_the_mean_over_the_patches(prefix):
    attention = probabilities(24 + prefix, 24 + prefix)
    found = attention_map(attention, (64, 96))
    assert found.shape == (2, 3, 4, 6)
    assert torch.allclose(found.flatten(2), attention[:, :, prefix:, prefix:].mean(2))


def test_the_class_token_may_ask_alone():
    attention = probabilities(1, 25)
    assert torch.equal(attention_map(attention, (64, 96)).flatten(2), attention[:, :, 0, 1:])


def test_patches_may_attend_to_a_coarser_grid():
    attention = probabilities(96, 6)
    found = attention_map(attention, (64, 96))
    assert found.shape == (2, 3, 2, 3) and torch.allclose(found.flatten(2), attention.mean(2))


def test_tokens_in_front_can_be_given():
    attention = probabilities(18, 18)
    assert attention_map(attention, (64, 64)).shape == attention_map(attention, (64, 64), 2).shape == (2, 3, 4, 4)
    with pytest.raises(DistillError, match='18 tokens are no patch grid of a 64x64 image behind 1 '):
        attention_map(attention, (64, 64), 1)


def test_gradients_reach_the_probabilities():
    attention = probabilities(17, 17).requires_grad_()
    attention_map(attention, (64, 64)).square().sum().backward()
    assert attention.grad[:, :, 0, 1:].abs().min() > 0 and not attention.grad[:, :, 1:].any()


@pytest.mark.parametrize(
    ('shape', 'size', 'words'),
    [
        ((2, 4, 3, 9, 9), (64, 64), r'\(2, 4, 3, 9, 9\); attention within windows is of no use here'),
        ((2, 17, 17), (64, 64), r'takes \(B, heads, queries, tokens\)'),
        ((2, 3, 300, 300), (64, 64), '300 tokens are no patch grid'),
        ((2, 3, 17, 17), None, r'image_size must be \(H, W\)'),
    ],
)
def test_what_is_no_attention_over_an_image(shape, size, words):
    with pytest.raises(DistillError, match=words):
        attention_map(torch.zeros(shape), size)
