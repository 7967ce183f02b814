"""Adapters: the right one for a pair of shapes, the right numbers, following the grid."""

import copy

import pytest
import torch

import kd_plugins.adapters as adapters
from kd_plugins.adapters import ConvAdapter, ResizeAdapter, auto_adapter, describe_adapter
from kd_plugins.adapters.auto import AdapterChain
from kd_plugins.errors import DistillError


@pytest.mark.parametrize(
    'student, teacher, kind, words',
    [
        ((2, 96, 20, 20), (2, 96, 20, 20), type(None), 'none'),
        ((2, 197, 384), (2, 197, 384), type(None), 'none'),
        ((2, 96, 20, 20), (2, 256, 20, 20), ConvAdapter, 'conv 1x1 96->256 (24.8k params)'),
        ((2, 96, 10, 12), (2, 96, 20, 24), ResizeAdapter, 'resize 10x12->20x24'),
        ((2, 96, 10, 10), (2, 256, 20, 20), AdapterChain, 'conv 1x1 96->256 (24.8k params), resize 10x10->20x20'),
        ((2, 4, 40, 40), (2, 8, 20, 20), AdapterChain, 'conv 1x1 4->8 (40 params), resize 40x40->20x20'),
    ],
)
def test_auto_adapter(student, teacher, kind, words):
    adapter = auto_adapter(student, teacher)
    assert type(adapter) is kind
    assert describe_adapter(adapter, student, teacher) == words
    if adapter is not None:
        assert adapter(torch.randn(student), torch.randn(teacher)).shape == teacher


def test_auto_adapter_takes_torch_sizes():
    assert auto_adapter(torch.zeros(1, 2, 3, 3).shape, torch.zeros(1, 2, 3, 3).shape) is None
    assert isinstance(auto_adapter(torch.Size([1, 2, 3, 3]), [1, 4, 3, 3]), ConvAdapter)


@pytest.mark.parametrize(
    'student, teacher, match',
    [
        ((2, 197, 384), (2, 197, 768), r'student is not a \(B, C, H, W\) map'),
        ((2, 96, 20, 20), (2, 1000), r'teacher is not a \(B, C, H, W\) map'),
        ((2, 96, 7, 7), (512, 96, 7, 7), 'batch size'),
    ],
)
def test_auto_adapter_refuses(student, teacher, match):
    with pytest.raises(DistillError, match=match) as error:
        auto_adapter(student, teacher)
    assert str(student) in str(error.value) and str(teacher) in str(error.value)


def test_conv_is_a_linear_map_of_the_channels():
    adapter = ConvAdapter(3, 5).double()
    student = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    weight, bias = adapter.conv.weight[:, :, 0, 0], adapter.conv.bias
    expected = (weight @ student.flatten(2)).reshape(2, 5, 4, 6) + bias.reshape(1, 5, 1, 1)
    torch.testing.assert_close(adapter(student, torch.zeros(2, 5, 4, 6)), expected)


def test_conv_is_trained_by_a_loss_on_its_output():
    adapter = auto_adapter((2, 3, 4, 4), (2, 5, 8, 8))
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 8, 8)
    (adapter(student, teacher) - teacher).square().mean().backward()
    assert student.grad.abs().sum() > 0
    assert [n for n, p in adapter.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0] == [
        '0.conv.weight',
        '0.conv.bias',
    ]


def test_conv_accepts_features_captured_under_autocast():
    adapter, student = ConvAdapter(3, 5), torch.randn(2, 3, 4, 4).bfloat16()
    assert adapter(student, None).dtype == torch.float32
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert adapter(student, None).dtype == torch.bfloat16


def test_resize_is_bilinear_with_half_pixel_centres():
    """Doubling a row of two, a and b: a, 3/4 a + 1/4 b, 1/4 a + 3/4 b, b (align_corners would give thirds)."""
    student = torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2)
    adapted = ResizeAdapter()(student, torch.zeros(1, 7, 1, 4))
    assert adapted.flatten().tolist() == [0.0, 1.0, 3.0, 4.0]


def test_resize_follows_the_teacher_at_every_call():
    adapter = auto_adapter((1, 2, 10, 10), (1, 4, 20, 20))
    for size in ((16, 24), (20, 20), (7, 9)):
        assert adapter(torch.randn(1, 2, 8, 12), torch.randn(1, 4, *size)).shape == (1, 4, *size)


def test_resize_of_equal_grids_is_the_same_tensor():
    student = torch.randn(1, 2, 8, 8)
    assert ResizeAdapter()(student, torch.randn(1, 5, 8, 8)) is student


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_resize_keeps_the_dtype(dtype):
    assert ResizeAdapter()(torch.ones(1, 2, 4, 4, dtype=dtype), torch.ones(1, 2, 8, 8)).dtype == dtype


@pytest.mark.parametrize('bad', [0, -3, 2.0, '96', None, True])
def test_channel_counts_are_checked(bad):
    with pytest.raises(DistillError, match=f'in_channels must be an integer >= 1, got {bad!r}'):
        ConvAdapter(bad, 8)
    with pytest.raises(DistillError, match='out_channels'):
        ConvAdapter(8, bad)


def test_description_of_a_users_own_adapter():
    shapes = (1, 1000, 8, 8), (1, 1001, 8, 8)
    assert describe_adapter(torch.nn.Conv2d(1000, 1001, 1), *shapes) == 'Conv2d (1.0M params)'
    assert describe_adapter(torch.nn.Identity(), *shapes) == 'Identity (0 params)'
    assert describe_adapter(torch.nn.Linear(999_999, 1, bias=False), *shapes) == 'Linear (1.0M params)'


def test_state_survives_a_copy():
    adapter = auto_adapter((2, 3, 4, 4), (2, 5, 8, 8))
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 8, 8)
    other = auto_adapter((2, 3, 4, 4), (2, 5, 8, 8))
    other.load_state_dict(adapter.state_dict())
    for same in (other, copy.deepcopy(adapter)):
        assert torch.equal(same(student, teacher), adapter(student, teacher))


def test_names_that_a_config_can_use():
    modules = [n for n in adapters.__all__ if isinstance(getattr(adapters, n), type)]
    assert modules == ['ConvAdapter', 'ResizeAdapter']
