"""Adapters: the right one for a pair of shapes, the right numbers, following the grid."""

import copy

import pytest
import torch

import kd_plugins.adapters as adapters
from kd_plugins.adapters import (
    AdapterChain,
    ConvAdapter,
    LinearAdapter,
    MapToTokens,
    ResizeAdapter,
    TokensToMap,
    auto_adapter,
    describe_adapter,
)
from kd_plugins.errors import DistillError


@pytest.mark.parametrize(
    'student, teacher, kind, words',
    [
        ((2, 96, 20, 20), (2, 96, 20, 20), ResizeAdapter, 'none'),
        ((2, 197, 384), (2, 197, 384), type(None), 'none'),
        ((2, 96, 20, 20), (2, 256, 20, 20), AdapterChain, 'conv 1x1 96->256 (24.8k params)'),
        ((2, 96, 10, 12), (2, 96, 20, 24), ResizeAdapter, 'resize 10x12->20x24'),
        ((2, 96, 10, 10), (2, 256, 20, 20), AdapterChain, 'conv 1x1 96->256 (24.8k params), resize 10x10->20x20'),
        ((2, 4, 40, 40), (2, 8, 20, 20), AdapterChain, 'resize 40x40->20x20, conv 1x1 4->8 (40 params)'),
        ((2, 4, 10, 40), (2, 8, 20, 10), AdapterChain, 'resize 10x40->20x10, conv 1x1 4->8 (40 params)'),
        ((2, 197, 192), (2, 197, 384), LinearAdapter, 'linear 192->384 (74.1k params)'),
        ((2, 192), (2, 384), LinearAdapter, 'linear 192->384 (74.1k params)'),
    ],
)
def test_auto_adapter(student, teacher, kind, words):
    adapter = auto_adapter(student, teacher)
    assert type(adapter) is kind
    assert describe_adapter(adapter, student, teacher) == words
    if adapter is not None:
        assert adapter(torch.randn(student), torch.randn(teacher)).shape == teacher


def test_auto_adapter_takes_torch_sizes():
    assert isinstance(auto_adapter(torch.zeros(1, 2, 3, 3).shape, torch.zeros(1, 2, 3, 3).shape), ResizeAdapter)
    assert isinstance(auto_adapter(torch.Size([1, 2, 3, 3]), [1, 4, 3, 3])[0], ConvAdapter)


@pytest.mark.parametrize(
    'student, teacher, kind',
    [
        ((2, 96, 20, 20), (2, 256, 20, 20), ResizeAdapter),
        ((2, 96, 10, 10), (2, 256, 20, 20), ResizeAdapter),
        ((2, 197, 192), (2, 197, 384), type(None)),
        ((2, 192), (2, 384), type(None)),
    ],
)
def test_auto_adapter_may_leave_the_channels_alone(student, teacher, kind):
    assert type(auto_adapter(student, teacher, channels=False)) is kind


def test_auto_adapter_takes_its_options_from_a_config():
    options = dict(norm=True)
    adapter = auto_adapter((2, 4, 10, 10), (2, 8, 20, 20), **options)
    assert adapter.describe((2, 4, 10, 10), (2, 8, 20, 20)) == 'conv 1x1 4->8 + BN (48 params), resize 10x10->20x20'
    assert type(auto_adapter((2, 4, 10, 10), (2, 4, 20, 20), **options)) is ResizeAdapter
    assert auto_adapter((2, 9, 4), (2, 9, 4)) is None


@pytest.mark.parametrize(
    'student, teacher, match',
    [
        ((2, 96, 20, 20), (2, 1000), r'student is a \(B, C, H, W\) map, the teacher a \(B, C\) vector'),
        ((2, 197, 384), (2, 384, 14, 14), r'student is a \(B, N, C\) token sequence'),
        ((2, 3, 4, 5, 6), (2, 3, 4, 5, 7), 'a 5-d tensor'),
        ((2, 96, 7, 7), (512, 96, 7, 7), 'batch size'),
        ((2, 96), (512, 96), 'batch size'),
        ((2, 197, 384), (2, 196, 384), 'token counts differ; bring both to maps'),
    ],
)
def test_auto_adapter_refuses(student, teacher, match):
    with pytest.raises(DistillError, match=match) as error:
        auto_adapter(student, teacher)
    assert str(student) in str(error.value) and str(teacher) in str(error.value)


@pytest.mark.parametrize(
    'options, match',
    [
        (dict(norm='BN'), "norm must be True or False, got 'BN'"),
        (dict(channels=1), 'channels must be True or False, got 1'),
        (dict(norm=True, channels=False), 'remove one of them'),
    ],
)
def test_auto_adapter_checks_its_options(options, match):
    with pytest.raises(DistillError, match=match):
        auto_adapter((2, 4, 8, 8), (2, 8, 8, 8), **options)


def test_auto_adapter_has_no_norm_for_tokens():
    with pytest.raises(DistillError, match=r'norm=True is for maps, not for a \(B, N, C\) token sequence'):
        auto_adapter((2, 9, 4), (2, 9, 8), norm=True)


@pytest.mark.parametrize('grid', [(5, 6), (23, 17), (64, 24), (24, 5)])
@pytest.mark.parametrize('norm', [False, True])
def test_order_of_convolution_and_resize_does_not_matter(grid, norm):
    """With a norm this holds in evaluation; in training its statistics are those of the map it sees."""
    conv, student, teacher = (
        ConvAdapter(3, 5, norm).double(),
        torch.randn(2, 3, *grid).double(),
        torch.zeros(2, 5, 8, 8),
    )
    if norm:
        conv.norm.running_mean.normal_()
        conv.norm.running_var.uniform_(0.5, 2)
    one, other = AdapterChain(conv, ResizeAdapter()), AdapterChain(ResizeAdapter(), conv)
    torch.testing.assert_close(one.eval()(student, teacher), other.eval()(student, teacher))
    if norm:
        assert (one.train()(student, teacher) - other.train()(student, teacher)).abs().max() > 0.1


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


def test_conv_with_norm_is_normalised_and_has_no_bias():
    adapter = ConvAdapter(3, 5, norm=True)
    adapted = adapter(3 * torch.randn(4, 3, 8, 8) + 7, None)
    torch.testing.assert_close(adapted.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(adapted.var((0, 2, 3), unbiased=False), torch.ones(5), atol=1e-3, rtol=0)
    assert [n for n, _ in adapter.named_parameters()] == ['conv.weight', 'norm.weight', 'norm.bias']
    assert adapter.describe((4, 3, 8, 8), (4, 5, 8, 8)) == 'conv 1x1 3->5 + BN (25 params)'
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.isfinite(adapter(torch.randn(2, 3, 4, 4).bfloat16(), None)).all()


@pytest.mark.parametrize('shape', [(2, 7, 3), (2, 3)])
def test_linear_projects_the_last_dimension(shape):
    adapter, student = LinearAdapter(3, 5), torch.randn(shape)
    expected = torch.einsum('...i,oi->...o', student, adapter.linear.weight) + adapter.linear.bias
    torch.testing.assert_close(adapter(student, None), expected)
    assert adapter(student.bfloat16(), None).dtype == torch.float32


def test_resize_is_bilinear_with_half_pixel_centres():
    """Doubling a row of two, a and b: a, 3/4 a + 1/4 b, 1/4 a + 3/4 b, b (align_corners would give thirds)."""
    student = torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2)
    adapted = ResizeAdapter()(student, torch.zeros(1, 7, 1, 4))
    assert adapted.flatten().tolist() == [0.0, 1.0, 3.0, 4.0]


@pytest.mark.parametrize('stripe', range(8))
def test_strong_downsampling_does_not_alias(stripe):
    """One column in eight is 8, so every cell of 64 -> 8 means 1, wherever in its cell the column is."""
    student = torch.zeros(1, 1, 64, 64)
    student[..., stripe::8] = 8
    adapted = ResizeAdapter()(student, torch.zeros(1, 1, 8, 8))
    torch.testing.assert_close(adapted, torch.ones(1, 1, 8, 8))
    plain = torch.nn.functional.interpolate(student, size=(8, 8), mode='bilinear')
    assert plain.unique().tolist() == [4.0 if stripe in (3, 4) else 0.0], 'torch no longer aliases: simplify resize'


@pytest.mark.parametrize('size', [(8, 8), (7, 9), (1, 1), (31, 33), (32, 5), (128, 8)])
def test_downsampling_gives_every_position_a_gradient(size):
    student = torch.randn(1, 1, 64, 64, requires_grad=True)
    ResizeAdapter()(student, torch.zeros(1, 1, *size)).sum().backward()
    assert (student.grad > 0).all()


@pytest.mark.parametrize('size', [(8, 8), (7, 9), (32, 32), (100, 5), (20, 64), (31, 33), (22, 1)])
def test_resize_keeps_places_and_constants(size):
    """A ramp stays a ramp: the value in a cell is the place of its centre, up to the border."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing='ij')
    student = torch.stack([rows, columns, torch.ones(64, 64)])[None].double()
    adapted = ResizeAdapter()(student, torch.zeros(1, 3, *size))[0]
    for side, ramp in ((0, adapted[0, :, 0]), (1, adapted[1, 0, :])):
        centres = (torch.arange(size[side]) + 0.5) * 64 / size[side] - 0.5
        assert (ramp - centres.clamp(0, 63) / 63).abs().max() < 0.1 / 63
    torch.testing.assert_close(adapted[2], torch.ones(size, dtype=torch.float64))


def test_resize_is_continuous_where_pooling_begins():
    """At the factor 2, bilinear interpolation already is the mean that pooling takes beyond it."""
    student = torch.randn(1, 2, 16, 16)
    adapted = ResizeAdapter()(student, torch.zeros(1, 2, 8, 8))
    torch.testing.assert_close(adapted, torch.nn.functional.avg_pool2d(student, 2))


def test_resize_refuses_tokens():
    tokens, features = torch.zeros(1, 9, 4), torch.zeros(1, 4, 3, 3)
    with pytest.raises(DistillError, match=r"student is \(1, 9, 4\), .* put dict\(type='TokensToMap'\) before it"):
        ResizeAdapter()(tokens, features)
    with pytest.raises(DistillError, match=r"teacher is \(1, 9, 4\), .* write dict\(type='MapToTokens'\)"):
        ResizeAdapter()(features, tokens)


def test_resize_follows_the_teacher_at_every_call():
    adapter = auto_adapter((1, 2, 10, 10), (1, 4, 20, 20))
    for size in ((16, 24), (20, 20), (7, 9)):
        assert adapter(torch.randn(1, 2, 8, 12), torch.randn(1, 4, *size)).shape == (1, 4, *size)


@pytest.mark.parametrize('channels', [2, 4])
def test_auto_adapter_of_equal_grids_follows_others(channels):
    """64 pixels make 16 cells in both networks, 73 make 19 in a ResNet and 18 behind a patch embedding."""
    adapter = auto_adapter((1, 2, 16, 16), (1, channels, 16, 16))
    assert adapter(torch.randn(1, 2, 19, 19), torch.randn(1, channels, 18, 18)).shape == (1, channels, 18, 18)


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
    with pytest.raises(DistillError, match=f'in_features must be an integer >= 1, got {bad!r}'):
        LinearAdapter(bad, 8)
    with pytest.raises(DistillError, match='out_features'):
        LinearAdapter(8, bad)


def test_norm_is_a_truth_value():
    with pytest.raises(DistillError, match="norm must be True or False, got 'BN'"):
        ConvAdapter(8, 8, norm='BN')


def test_chain_passes_the_image_size_to_those_that_need_it():
    class Asks(torch.nn.Module):
        needs_image_size = True

        def forward(self, student, teacher, image_size):
            return student + image_size[0]

    class AsksNot(torch.nn.Module):
        def forward(self, student, teacher):
            return student * 2

    one, teacher = torch.ones(1), None
    assert AdapterChain(AsksNot(), Asks())(one, teacher, image_size=(5, 7)) == 7
    assert AdapterChain(AsksNot(), AdapterChain(Asks()))(one, teacher, image_size=(5, 7)) == 7
    assert AdapterChain(AsksNot())(one, teacher) == AdapterChain(AsksNot())(one, teacher, image_size=(5, 7)) == 2
    assert AdapterChain(AsksNot(), AdapterChain(Asks())).needs_image_size
    assert not AdapterChain(AsksNot()).needs_image_size


def test_chain_of_a_config():
    """A ViT student's tokens and a convolutional teacher."""
    chain = AdapterChain(TokensToMap(), ConvAdapter(6, 4), ResizeAdapter())
    student, teacher = torch.randn(2, 3 * 5 + 1, 6), torch.randn(2, 4, 12, 20)
    assert chain(student, teacher, image_size=(48, 80)).shape == teacher.shape
    assert chain.describe(student.shape, teacher.shape) == 'to map, conv 1x1 6->4 (28 params), resize to 12x20'
    assert describe_adapter(chain[1:], (2, 6, 3, 5), teacher.shape) == 'conv 1x1 6->4 (28 params), resize 3x5->12x20'


def test_chain_into_tokens():
    """A convolutional student and a ViT teacher."""
    chain = AdapterChain(ConvAdapter(4, 6), MapToTokens())
    student, teacher = torch.randn(2, 4, 6, 10), torch.randn(2, 3 * 5 + 1, 6)
    assert chain(student, teacher, image_size=(48, 80)).shape == teacher.shape
    assert chain.describe(student.shape, teacher.shape) == 'conv 1x1 4->6 (30 params), to 16 tokens'


def test_chain_refuses_what_is_none():
    with pytest.raises(DistillError, match='needs members'):
        AdapterChain()
    with pytest.raises(DistillError, match="'ResizeAdapter' is not an adapter"):
        AdapterChain('ResizeAdapter')


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
    assert modules == [
        'AdapterChain',
        'ChannelNorm',
        'ConvAdapter',
        'LinearAdapter',
        'LogitProjector',
        'MapToTokens',
        'ResizeAdapter',
        'TokensToMap',
    ]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_channel_norm_is_batch_normalisation_without_parameters(dtype):
    norm = adapters.ChannelNorm()
    features = (torch.randn(3, 5, 6, 4, generator=torch.Generator().manual_seed(0)) * 3 + 2).to(dtype)
    plain = torch.nn.BatchNorm2d(5, affine=False, track_running_stats=False)
    expected = plain(features.double())
    found = norm(features, features)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    tokens = norm(features.flatten(2).transpose(1, 2), features)
    torch.testing.assert_close(tokens.transpose(1, 2).reshape(3, 5, 6, 4), found)
    # Nothing to learn, and other magnitudes change nothing.
    assert not list(norm.parameters()) and not norm.state_dict()
    if dtype == torch.float64:
        torch.testing.assert_close(norm(1000 * features + 7, features), found, rtol=1e-4, atol=1e-4)
    assert describe_adapter(norm, features.shape, features.shape) == 'channel norm'


def test_channel_norm_of_a_constant_is_zero_and_vectors_have_no_positions():
    constant = torch.full((2, 3, 4, 4), 7.0, requires_grad=True)
    found = adapters.ChannelNorm()(constant, constant)
    assert not found.any()
    found.sum().backward()
    assert torch.isfinite(constant.grad).all()
    with pytest.raises(DistillError, match=r'not \(2, 3\)'):
        adapters.ChannelNorm()(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(DistillError, match='eps'):
        adapters.ChannelNorm(eps=0)
