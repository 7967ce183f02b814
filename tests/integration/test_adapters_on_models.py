"""Tokens, channels-last maps and attention of real transformers become maps in which every cell is where its patch is;
transformers and convolutional networks teach each other."""

import pytest
import torch
from torch import nn

from kd_plugins.adapters import as_map, attention_map
from kd_plugins.distiller import Capture, Session, Tap, build_terms
from kd_plugins.errors import DistillError
from kd_plugins.predictions import ClassLogits
from kd_plugins.teachers import FrozenTeacher

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


ATTENDING = {
    'vit_tiny_patch16_224': dict(**TINY, img_size=(96, 160)),
    'vit_small_patch14_reg4_dinov2': dict(**TINY, img_size=(70, 112)),
    'deit_tiny_distilled_patch16_224': dict(**TINY, img_size=(96, 160)),
    'deit3_small_patch16_224': dict(**TINY, img_size=(96, 160)),
    'eva02_tiny_patch14_224': dict(**TINY, img_size=(70, 112)),
    'beit_base_patch16_224': dict(**TINY, img_size=(96, 160)),
    'vit_relpos_small_patch16_224': dict(**TINY, img_size=(96, 160)),
    'naflexvit_base_patch16_gap': dict(**TINY),
    'swin_tiny_patch4_window7_224': TINY_SWIN,
    'pvt_v2_b0': {},
    'pit_ti_distilled_224': {},
    'cait_xxs24_224': dict(**TINY),
}


@pytest.mark.parametrize('name', ATTENDING)
def test_attention_of_timm_is_tapped_without_changing_what_is_computed(name):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **ATTENDING[name]).train()
    path = [p for p, m in model.named_modules() if p.endswith('attn_drop') and isinstance(m, nn.Dropout)][-1]
    owner = model.get_submodule(path.removesuffix('.attn_drop'))
    fused = getattr(owner, 'fused_attn', None)
    image = torch.randn(2, 3, *ATTENDING[name].get('img_size', (224, 224)))
    with torch.no_grad():
        torch.manual_seed(1)  # stochastic depth
        expected = model(image)
        torch.manual_seed(1)
        with Capture(model, [path], 'net') as capture:
            found = model(image)
    for got, wanted in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)
    assert getattr(owner, 'fused_attn', None) == fused and 'forward' not in owner.attn_drop.__dict__
    (tensor,) = capture.maps(Tap(path))
    assert tensor.dim() == 4 and torch.allclose(tensor.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'options', 'size', 'patch'),
    [
        ('vit_tiny_patch16_224', dict(img_size=(96, 160)), (96, 160), 16),
        ('vit_tiny_patch16_224', dict(img_size=32, patch_size=4), (32, 32), 4),
        ('deit_tiny_distilled_patch16_224', dict(img_size=(96, 160)), (96, 160), 16),
        ('vit_small_patch14_reg4_dinov2', dict(img_size=(70, 112)), (70, 112), 14),
        ('vit_tiny_patch16_224', dict(img_size=(96, 160), class_token=False, global_pool='avg'), (96, 160), 16),
    ],
)
def test_attention_lies_where_the_patches_are(name, options, size, patch):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **{**TINY, **options}).eval()
    # Queries and keys that are strong enough for the attention to tell patches apart.
    model.blocks[0].attn.qkv.weight.data.mul_(10)

    def attention(image):
        with torch.no_grad(), Capture(model, ['blocks.0.attn.attn_drop'], 'net') as capture:
            model(image)
        return attention_map(capture.maps(Tap('blocks.0.attn.attn_drop'))[0], size)

    image = torch.randn(1, 3, *size)
    before = attention(image)
    assert before.shape == (1, 2, size[0] // patch, size[1] // patch)
    for row, column in ((0, before.shape[3] - 1), (before.shape[2] - 1, 0), (1, 2)):
        changed = image.clone()
        changed[..., row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] *= -1
        # Relative to what was there: what one patch gains, all others lose in proportion.
        ratio = (attention(changed) / before).log()[0]
        moved = (ratio - ratio.flatten(1).median(1).values[:, None, None]).abs().sum(0)
        assert divmod(int(moved.argmax()), before.shape[3]) == (row, column)


class Classifier(nn.Module):
    """A network under ``net`` and its logits, as taps of classifiers are written."""

    def __init__(self, name, **options):
        super().__init__()
        import timm

        self.net = timm.create_model(name, pretrained=False, **options)
        self.logits = ClassLogits(options.get('num_classes', 1000))

    def forward(self, x):
        return self.logits(self.net(x))


def run(model, inputs, samples, modules):
    model(inputs)


def learn(student, teacher, size, /, **term):
    """Check a term as the start of a run does, and let it make gradients; returns its row and its value."""
    torch.manual_seed(0)
    student, teacher = student.train(), teacher.eval()
    held = FrozenTeacher(teacher, run, lambda inputs, samples: inputs, name='net')
    distiller = Session(student, held, build_terms(dict(term=term)))
    inputs = torch.randn(2, 3, *size)
    (row,) = distiller.check(inputs, None)
    with distiller.capture() as capture:
        student(inputs)
    value = distiller.losses(capture, inputs, None)['loss_kd_term']
    value.backward()
    assert value > 0 and all(p.grad is not None for p in distiller.bank.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    return row, value.item()


VIT = dict(depth=2, embed_dim=48, num_heads=3, num_classes=10)
SIZES = {
    '224': ((224, 224), dict(img_size=224), '48x14x14', {3: '14x14', 4: '7x7'}),
    '32': ((32, 32), dict(img_size=32, patch_size=4), '48x8x8', {3: '2x2', 4: '1x1'}),
    'wide': ((96, 160), dict(img_size=(96, 160)), '48x6x10', {3: '6x10', 4: '3x5'}),
}
LOSSES = ('FeatureMSELoss', 'AttentionTransferLoss', 'MGDLoss', 'ChannelWiseDivLoss')


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('layer', [3, 4])
def test_a_vit_teaches_features_to_a_resnet(loss, size, layer):
    pytest.importorskip('timm')
    pixels, options, tokens, maps = SIZES[size]
    student = Classifier('resnet18', num_classes=10)
    teacher = Classifier(
        'deit_tiny_distilled_patch16_224' if size == 'wide' else 'vit_tiny_patch16_224', **VIT, **options
    )
    taps = dict(student=f'net.layer{layer}', teacher='net.blocks.1')
    row, _ = learn(student, teacher, pixels, loss=dict(type=loss), **taps)
    channels = {3: 256, 4: 512}[layer]
    assert (row.student_shape, row.teacher_shape) == (f'{channels}x{maps[layer]}', tokens)
    assert ('conv 1x1' in row.adapter) == (loss != 'AttentionTransferLoss')


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('size', SIZES)
def test_a_resnet_teaches_features_to_a_vit(loss, size):
    pytest.importorskip('timm')
    pixels, options, tokens, maps = SIZES[size]
    student = Classifier('vit_tiny_patch16_224', **VIT, **options)
    taps = dict(student='net.blocks.1', teacher='net.layer3')
    row, _ = learn(student, Classifier('resnet18', num_classes=10), pixels, loss=dict(type=loss), **taps)
    assert (row.student_shape, row.teacher_shape) == (tokens, f'256x{maps[3]}')


@pytest.mark.parametrize('size', SIZES)
def test_attention_of_a_vit_teaches_a_resnet_and_learns_from_one(size):
    pytest.importorskip('timm')
    pixels, options, tokens, maps = SIZES[size]

    def models():  # anew for each, because a teacher is frozen
        return Classifier('vit_tiny_patch16_224', **VIT, **options), Classifier('resnet18', num_classes=10)

    vit, resnet = models()
    taps = dict(student='net.layer3', teacher='net.blocks.1.attn.attn_drop')
    row, _ = learn(resnet, vit, pixels, loss=dict(type='AttentionTransferLoss'), **taps)
    assert (row.student_shape, row.teacher_shape) == (f'256x{maps[3]}', tokens.replace('48x', '3x'))
    assert row.parameters == 0
    vit, resnet = models()
    taps = dict(student=taps['teacher'], teacher=taps['student'])
    row, _ = learn(vit, resnet, pixels, loss=dict(type='AttentionTransferLoss'), **taps)
    assert row.student_shape == tokens.replace('48x', '3x')
    assert vit.net.blocks[1].attn.qkv.weight.grad.abs().sum() > 0 and vit.net.blocks[1].attn.fused_attn


def test_windows_of_swin_are_refused():
    pytest.importorskip('timm')

    def swin():
        return Classifier('swin_tiny_patch4_window7_224', num_classes=10, **TINY_SWIN)

    attention = 'net.layers.3.blocks.0.attn.attn_drop'
    for student, tap in ((Classifier('resnet18', num_classes=10), 'net.layer3'), (swin(), attention)):
        with pytest.raises(DistillError, match='WindowAttention attends within windows'):
            taps = dict(student=tap, teacher=attention)
            learn(student, swin(), (224, 224), loss=dict(type='AttentionTransferLoss'), **taps)


@pytest.mark.parametrize(
    ('name', 'options', 'tap', 'shape'),
    [
        ('resnet18', {}, 'net.layer3', '256x6x10'),
        ('vit_tiny_patch16_224', dict(depth=2, embed_dim=48, num_heads=3, img_size=(96, 160)), 'net.blocks.0', '61x48'),
        ('swin_tiny_patch4_window7_224', dict(img_size=(96, 160), **TINY_SWIN), 'net.layers.2', '64x6x10'),
    ],
)
def test_features_of_any_architecture_are_projected_to_logits(name, options, tap, shape):
    pytest.importorskip('timm')
    student = Classifier(name, num_classes=10, **options)
    teacher = Classifier('regnety_002', num_classes=10)
    term = dict(loss=dict(type='KLDivLoss'), student=tap, teacher='logits', adapter=dict(type='LogitProjector'))
    row, _ = learn(student, teacher, (96, 160), **term)
    assert (row.student_shape, row.teacher_shape) == (shape, '10')
    assert row.adapter.startswith('projector') and row.parameters > 0
