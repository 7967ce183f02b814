"""Tokens and maps: the right grid for any image, every token in its place, and a refusal where it is a guess."""

import pytest
import torch

from kd_plugins.adapters import MapToTokens, TokensToMap, as_map, as_tokens, find_grid
from kd_plugins.errors import DistillError

SIZES = [
    (224, 224),
    (224, 160),
    (256, 512),
    (512, 1024),
    (96, 160),
    (64, 64),
    (128, 128),
    (384, 288),
    (256, 128),
    (480, 640),
    (640, 640),
    (416, 416),
    (518, 518),
    (800, 1333),  # divisible by nothing
    (512, 683),
    (225, 301),
]


def up(side, patch):
    return -(-side // patch)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('patch', [4, 8, 14, 16, 32])
def test_grid_of_any_transformer(size, patch):
    """Swin and SegFormer stages, ViTs with class, distillation and register tokens; padded and unpadded."""
    for prefix in (0, 1, 2, 4, 5):
        for side in (up, int.__floordiv__):
            grid = side(size[0], patch), side(size[1], patch)
            assert find_grid(grid[0] * grid[1] + prefix, size) == (*grid, prefix)
            assert find_grid(grid[0] * grid[1] + prefix, size, prefix_tokens=prefix) == (*grid, prefix)


@pytest.mark.parametrize(
    'count, size, expected',
    [
        (49, (224, 224), (7, 7, 0)),
        (197, (224, 224), (14, 14, 1)),
        (198, (224, 224), (14, 14, 2)),
        (261, (224, 224), (16, 16, 5)),
        (3137, (224, 224), (56, 56, 1)),
        (401, (240, 240), (20, 20, 1)),  # patch 12
        (28 * 28 + 1, (280, 280), (28, 28, 1)),  # patch 10
        (9, (80, 80), (3, 3, 0)),  # last stage of a Swin, padded; not 2x2 patches of 40 behind 5 tokens
        (2, (16, 16), (1, 1, 1)),
        (8 * 17, (66, 134), (8, 17, 0)),  # 16x33 patches of 4, the rest dropped; then merged, padded
    ],
)
def test_grid_of(count, size, expected):
    assert find_grid(count, size) == expected
    assert find_grid(count, torch.zeros(1, 3, *size).shape[2:], expected[2]) == expected


def test_given_prefix_decides():
    assert find_grid(9, (96, 96)) == (3, 3, 0)
    assert find_grid(9, (96, 96), prefix_tokens=5) == (2, 2, 5)
    assert find_grid(264, (256, 256), prefix_tokens=8) == (16, 16, 8)


@pytest.mark.parametrize(
    'count, size, prefix, match',
    [
        (300, (800, 1333), None, '300 tokens are no patch grid of a 800x1333 image behind 0 to 5'),  # DETR's queries
        (197, (256, 256), None, '197 tokens .* 256x256 .* tap a module'),
        (264, (256, 256), None, 'write prefix_tokens=8 '),
        (197, (224, 224), 2, 'behind 2 class.* write prefix_tokens=1 '),
        (42, (50, 50), None, r'42 tokens .* 6x7 or 7x6 .* grid=\(6, 7\)'),
        (0, (64, 64), None, '0 tokens'),
        (16, (64, 64), -1, 'prefix_tokens must be an integer >= 0, got -1'),
        (16, (64, 64), '1', "prefix_tokens must be an integer >= 0, got '1'"),
        (16, 64, None, r'image_size must be \(H, W\) in pixels, got 64'),
        (16, (3, 64, 64), None, r'got \(3, 64, 64\)'),
        (16, (64, 0), None, r'got \(64, 0\)'),
        (16, (64, 64.0), None, r'got \(64, 64.0\)'),
    ],
)
def test_no_guess(count, size, prefix, match):
    with pytest.raises(DistillError, match=match):
        find_grid(count, size, prefix)


def places(height, width):
    """``(1, 2, height, width)``: every cell says where it is."""
    return torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij'))[None].float()


@pytest.mark.parametrize('prefix', [0, 1, 2, 5])
@pytest.mark.parametrize('given', [False, True])
def test_tokens_come_to_their_place(prefix, given):
    cells = places(6, 10)
    tokens = torch.cat([torch.full((1, prefix, 2), -1.0), as_tokens(cells)], dim=1)
    assert tokens[0, prefix : prefix + 3].tolist() == [[0, 0], [0, 1], [0, 2]]
    assert torch.equal(as_map(tokens, (96, 160), prefix if given else None), cells)
    assert torch.equal(TokensToMap(prefix if given else None)(tokens, None, image_size=(96, 160)), cells)
    assert torch.equal(TokensToMap(prefix if given else None, grid=(6, 10))(tokens, None), cells)


@pytest.mark.parametrize('size', [(224, 224), (224, 160), (256, 512), (250, 130)])
def test_maps_pass_unchanged(size):
    for stride in (4, 8, 16, 32):
        features = torch.zeros(1, 64, up(size[0], stride), up(size[1], stride))
        assert as_map(features, size) is features
        assert TokensToMap()(features, None, image_size=size) is features
    for grid in ((1, 1), (6, 6), (7, 7), (100, 3)):  # pooled, or whatever a user's own module returns
        features = torch.zeros(1, 64, *grid)
        assert as_map(features, size) is features


@pytest.mark.parametrize('size', [(224, 224), (224, 160), (256, 512), (250, 130)])
def test_channels_last_is_recognised(size):
    for stride, channels in ((4, 96), (8, 192), (16, 384), (32, 768)):
        features = torch.randn(1, up(size[0], stride), up(size[1], stride), channels)
        for adapted in (as_map(features, size), TokensToMap()(features, None, image_size=size)):
            assert torch.equal(adapted, features.movedim(-1, 1))


def test_channels_first_wins_where_both_fit():
    features = torch.zeros(1, 56, 56, 56)
    assert as_map(features, (224, 224)) is features


@pytest.mark.parametrize(
    'shape, match',
    [
        ((2, 192), r'\(2, 192\) is neither .* vector has no positions'),
        ((2, 3, 4, 5, 6), 'tap another module'),
        ((), r'\(\) is neither'),
    ],
)
def test_other_dimensions_are_refused(shape, match):
    with pytest.raises(DistillError, match=match):
        as_map(torch.zeros(shape), (64, 64))
    with pytest.raises(DistillError, match='is no'):
        as_tokens(torch.zeros(shape))
    with pytest.raises(DistillError):
        TokensToMap(grid=(4, 4))(torch.zeros(shape), None)


def test_tokens_pass_as_tokens():
    tokens = torch.zeros(2, 9, 4)
    assert as_tokens(tokens) is tokens


def test_views_carry_gradients():
    tokens = torch.randn(2, 17, 3, requires_grad=True)
    adapted = as_map(tokens, (64, 64))
    assert adapted.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    adapted.sum().backward()
    assert tokens.grad[:, 0].abs().sum() == 0 and (tokens.grad[:, 1:] == 1).all()


def test_given_grid():
    features = places(6, 10)
    adapter = TokensToMap(grid=[6, 10])
    assert adapter(features, None) is features
    assert torch.equal(adapter(features.movedim(1, -1), None), features)
    assert adapter.describe((1, 61, 2), (1, 4, 3, 3)) == 'to map 6x10'
    with pytest.raises(DistillError, match=r'59 tokens are not grid=\(6, 10\) behind any number of'):
        adapter(torch.zeros(1, 59, 2), None)
    with pytest.raises(DistillError, match=r'62 tokens are not grid=\(6, 10\) behind 1 class'):
        TokensToMap(prefix_tokens=1, grid=(6, 10))(torch.zeros(1, 62, 2), None)
    with pytest.raises(DistillError, match=r'\(1, 2, 5, 10\) has no grid=\(6, 10\)'):
        adapter(features[:, :, :5], None)


@pytest.mark.parametrize('module', [TokensToMap, MapToTokens])
@pytest.mark.parametrize(
    'options, match',
    [
        (dict(prefix_tokens=-1), 'prefix_tokens must be an integer >= 0, got -1'),
        (dict(prefix_tokens=True), 'prefix_tokens'),
        (dict(grid=14), r'grid must be \(height, width\) in tokens, got 14'),
        (dict(grid=(14,)), 'grid must be'),
        (dict(grid='14'), 'grid must be'),
        (dict(grid=(14, 0)), r'grid\[1\] must be an integer >= 1, got 0'),
    ],
)
def test_options_are_checked(module, options, match):
    with pytest.raises(DistillError, match=f'{module.__name__}: {match}'):
        module(**options)


def test_image_size_is_needed():
    assert TokensToMap.needs_image_size and MapToTokens.needs_image_size
    for adapter, student in ((TokensToMap(), torch.zeros(1, 17, 2)), (MapToTokens(), torch.zeros(1, 2, 4, 4))):
        with pytest.raises(DistillError, match=r'needs image_size=\(H, W\), or option grid'):
            adapter(student, torch.zeros(1, 17, 2))
    with pytest.raises(DistillError, match='needs image_size'):
        TokensToMap()(torch.zeros(1, 4, 4, 2), None)


@pytest.mark.parametrize('options', [dict(), dict(prefix_tokens=1), dict(grid=(6, 10))])
def test_map_to_tokens_lines_up_with_the_teacher(options):
    student, teacher = places(6, 10).requires_grad_(), torch.randn(1, 61, 2, requires_grad=True)
    adapted = MapToTokens(**options)(student, teacher, image_size=(96, 160))
    assert torch.equal(as_map(adapted, (96, 160)), student)
    assert torch.equal(adapted[:, 0], teacher[:, 0])
    adapted.sum().backward()
    assert teacher.grad is None and (student.grad == 1).all()


def test_map_to_tokens_follows_the_teachers_grid():
    student = places(12, 20)
    adapted = MapToTokens()(student, torch.zeros(1, 60, 7), image_size=(96, 160))
    torch.testing.assert_close(adapted, as_tokens(2 * places(6, 10) + 0.5))


def test_map_to_tokens_refuses():
    with pytest.raises(DistillError, match=r"2 channels, the teacher 7; put dict\(type='ConvAdapter', in_channels=2"):
        MapToTokens()(places(6, 10), torch.zeros(1, 61, 7), image_size=(96, 160))
    with pytest.raises(DistillError, match=r'got \(1, 9, 2\) and \(1, 9, 4\); remove it'):
        MapToTokens()(torch.zeros(1, 9, 2), torch.zeros(1, 9, 4), image_size=(48, 48))
