"""Tokens and channels-last maps of real transformers become maps in which every cell is where its patch is."""

import pytest
import torch

from kd_plugins.adapters import as_map

TINY = dict(depth=2, embed_dim=32, num_heads=2)
TINY_SWIN = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))


def outputs(model, paths, image):
    """The first tensor that each module returns, by path."""
    found, handles = {}, []
    for path in paths:

        def keep(module, args, output, path=path):
            found[path] = output if isinstance(output, torch.Tensor) else output[0]

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    with torch.no_grad():
        getattr(model, 'forward_features', model)(image)
    for handle in handles:
        handle.remove()
    return found


def check_places(model, paths, size, kinds, reach=0):
    """Change the image in one place; the map must change most there, whatever the place.

    Args:
        model: A transformer.
        paths: ``{module path: stride of its output}``.
        size: ``(H, W)`` of the image.
        kinds: Dimensions that the modules' outputs have, so that the test notices when a framework changes them.
        reach: Cells that the strongest change may be away, where patches overlap.
    """
    model.eval()  # alone: mmseg's ViT returns None from it
    torch.manual_seed(0)
    image = torch.randn(1, 3, *size)
    before = outputs(model, paths, image)
    assert {path: value.dim() for path, value in before.items()} == dict.fromkeys(paths, kinds)
    for path, stride in paths.items():
        grid = as_map(before[path], size).shape[2:]
        assert all(side in (pixels // stride, -(-pixels // stride)) for side, pixels in zip(grid, size, strict=True))
        for row, column in {(0, grid[1] - 1), (grid[0] - 1, 0), (grid[0] // 2, grid[1] // 3), (0, 0)}:
            changed = image.clone()
            changed[..., row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] += 4
            after = as_map(outputs(model, [path], changed)[path], size)
            difference = (after - as_map(before[path], size)).square().sum(1)[0]
            found = divmod(int(difference.argmax()), grid[1])
            assert max(abs(found[0] - row), abs(found[1] - column)) <= reach, f'{path}: {found}, not {(row, column)}'


@pytest.mark.parametrize(
    ('name', 'options', 'size', 'patch', 'prefix'),
    [
        ('vit_tiny_patch16_224', dict(img_size=224), (224, 224), 16, 1),
        ('vit_tiny_patch16_224', dict(img_size=(224, 160)), (224, 160), 16, 1),
        ('vit_tiny_patch16_224', dict(dynamic_img_size=True, dynamic_img_pad=True), (100, 130), 16, 1),
        ('vit_tiny_patch16_224', dict(img_size=(64, 128), patch_size=8), (64, 128), 8, 1),
        ('vit_tiny_patch16_224', dict(img_size=(256, 512), patch_size=32, class_token=False), (256, 512), 32, 0),
        ('deit_tiny_distilled_patch16_224', dict(img_size=(96, 160)), (96, 160), 16, 2),
        ('vit_small_patch14_reg4_dinov2', dict(img_size=(70, 112)), (70, 112), 14, 5),
    ],
)
def test_timm_vits(name, options, size, patch, prefix):
    timm = pytest.importorskip('timm')
    if options.get('class_token') is False:
        options = {**options, 'global_pool': 'avg'}
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **{**TINY, **options})
    assert model.num_prefix_tokens == prefix
    check_places(model, {'blocks.0': patch, 'blocks.1': patch, 'norm': patch}, size, kinds=3)


@pytest.mark.parametrize(
    ('options', 'size'),
    [
        (dict(img_size=(224, 224)), (224, 224)),
        (dict(img_size=(96, 160)), (96, 160)),
        (dict(img_size=(72, 136)), (72, 136)),  # odd grids: 18x34, 9x17, 5x9, 3x5
    ],
)
def test_timm_swin_has_its_channels_last(options, size):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    model = timm.create_model('swin_tiny_patch4_window7_224', pretrained=False, **TINY_SWIN, **options)
    paths = {'patch_embed': 4, 'layers.0': 4, 'layers.1': 8, 'layers.2': 16, 'layers.3': 32, 'norm': 32}
    check_places(model, paths, size, kinds=4)


@pytest.mark.parametrize('size', [(96, 160), (90, 150)])
def test_mmseg_swin_stages(size):
    backbones = pytest.importorskip('mmseg.models.backbones')
    torch.manual_seed(0)
    model = backbones.SwinTransformer(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), strides=(4, 2, 2, 2))
    paths = {f'stages.{i}.blocks.0': 4 * 2**i for i in range(4)}
    check_places(model, paths, size, kinds=3)


@pytest.mark.parametrize('size', [(96, 160), (90, 150)])
def test_mmseg_mix_transformer_stages(size):
    backbones = pytest.importorskip('mmseg.models.backbones')
    torch.manual_seed(0)
    model = backbones.MixVisionTransformer(
        embed_dims=16, num_stages=4, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], sr_ratios=[8, 4, 2, 1]
    )
    paths = {f'layers.{i}.2': 4 * 2**i for i in range(4)}
    check_places(model, paths, size, kinds=3, reach=1)


@pytest.mark.parametrize('size', [(96, 160), (90, 150)])
def test_mmseg_vit_layers(size):
    backbones = pytest.importorskip('mmseg.models.backbones')
    torch.manual_seed(0)
    model = backbones.VisionTransformer(
        img_size=(96, 160), embed_dims=32, num_layers=2, num_heads=2, with_cls_token=True
    )
    check_places(model, {'layers.0': 16, 'layers.1': 16}, size, kinds=3)
