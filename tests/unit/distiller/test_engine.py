"""What terms become: adapters by shape, losses per level, tokens and maps, what each loss may compare."""

import pytest
import torch
from torch import nn

from kd_plugins.distiller import Distiller, Teacher, build_terms
from kd_plugins.errors import DistillError


class Net(nn.Module):
    """Returns what it is told to, one output per level; a parameter makes it trainable."""

    def __init__(self, *shapes, factor=1.0):
        super().__init__()
        self.body = nn.Identity()
        self.scale = nn.Parameter(torch.tensor(factor))
        self.shapes = shapes
        self.body.forward = lambda x: tuple(self.scale * self._level(s, len(x)) for s in shapes)

    @staticmethod
    def _level(shape, batch):
        return torch.linspace(-1, 1, batch * torch.Size(shape).numel()).reshape(batch, *shape)

    def forward(self, x):
        return self.body(x)


def run(model, inputs, samples, modules):
    model(inputs)


def distiller_of(student, teacher, **term):
    term = {'loss': dict(type='FeatureMSELoss'), 'student': 'body', 'teacher': 'body', **term}
    held = Teacher(teacher, run, lambda inputs, samples: inputs, name='net')
    return Distiller(student, held, build_terms(dict(term=term)))


def row_of(student, teacher, size=(64, 64), **term):
    distiller = distiller_of(student, teacher, **term)
    (row,) = distiller.dry_run(torch.zeros(2, 3, *size), None, run)
    return distiller, row


def parameters(distiller):
    return sum(p.numel() for p in distiller.bank.parameters())


def test_auto_with_batch_normalisation():
    distiller, row = row_of(Net((4, 8, 8)), Net((6, 8, 8)), adapter=dict(type='auto', norm=True))
    assert parameters(distiller) == row.parameters == 4 * 6 + 2 * 6
    assert row.adapter.startswith('conv 1x1 4->6 + BN')


def test_a_check_leaves_the_statistics_of_an_adapter_alone():
    distiller, _ = row_of(Net((4, 8, 8)), Net((6, 8, 8)), adapter=dict(type='auto', norm=True))
    state = distiller.bank.export_state()
    (mean,) = (v for k, v in state.items() if k.endswith('running_mean'))
    assert not mean.any() and all(m.training for m in distiller.bank.modules())


def test_explicit_adapters_in_a_list_are_a_chain():
    adapter = [dict(type='ConvAdapter', in_channels=4, out_channels=6), dict(type='ResizeAdapter')]
    distiller, row = row_of(Net((4, 8, 8)), Net((6, 4, 4)), adapter=adapter)
    assert parameters(distiller) == 4 * 6 + 6
    assert row.adapter == 'conv 1x1 4->6 (30 params), resize 8x8->4x4'


@pytest.mark.parametrize('size, grid', [((64, 64), (4, 4)), ((32, 128), (2, 8))])
def test_tokens_meet_a_map_on_the_grid_of_the_image(size, grid):
    """17 tokens are a class token and 16 patches: 4x4 of a square image, 2x8 of a long one."""
    distiller, row = row_of(Net((4, *grid)), Net((17, 6)), size=size)
    assert row.teacher_shape == f'6x{grid[0]}x{grid[1]}'
    assert parameters(distiller) == 4 * 6 + 6


def test_channels_last_maps_are_recognised():
    _, row = row_of(Net((4, 8, 8)), Net((8, 8, 6)))
    assert row.teacher_shape == '6x8x8' and row.adapter.startswith('conv 1x1 4->6')


def test_token_sequences_of_other_patch_sizes_and_prefixes():
    distiller, row = row_of(Net((17, 4)), Net((66, 4)))
    assert (row.student_shape, row.teacher_shape) == ('4x4x4', '4x8x8')
    assert row.adapter == 'resize 4x4->8x8' and not parameters(distiller)
    _, row = row_of(Net((17, 4)), Net((66, 4)), adapter=dict(type='auto', prefix_tokens=(1, 2)))
    assert row.teacher_shape == '4x8x8'
    with pytest.raises(DistillError, match=r"term 'term': teacher 'body'.*prefix_tokens"):
        row_of(Net((17, 4)), Net((66, 4)), adapter=dict(type='auto', prefix_tokens=(1, 3)))


def test_sequences_without_a_grid_are_paired_in_order_and_projected():
    """11 queries are no grid of this image."""
    distiller, row = row_of(Net((11, 4)), Net((11, 6)))
    assert row.adapter.startswith('linear 4->6') and parameters(distiller) == 4 * 6 + 6


def test_channels_come_second_for_every_loss():
    """CWD normalises over positions: of (B, N, C) tokens that is N, whatever the layout."""
    from kd_plugins.losses import channel_wise_div

    student, teacher = Net((11, 4)), Net((11, 4), factor=3.0)
    distiller, _ = row_of(student, teacher, loss=dict(type='ChannelWiseDivLoss'))
    with distiller.capture() as capture:
        student(torch.zeros(2, 3, 64, 64))
    value = distiller.losses(capture, torch.zeros(2, 3, 64, 64), None)['loss_kd_term']
    level = Net._level((11, 4), 2).transpose(1, 2)
    assert value.item() == pytest.approx(channel_wise_div(level, 3 * level).item(), rel=1e-6)


def test_a_loss_with_parts_of_its_own_has_them_per_level():
    student, teacher = Net((4, 8, 8), (4, 4, 4)), Net((6, 8, 8), (5, 4, 4))
    distiller, row = row_of(student, teacher, loss=dict(type='MGDLoss'))
    generators = 2 * (6 * 6 * 9 + 6) + 2 * (5 * 5 * 9 + 5)
    assert parameters(distiller) == row.parameters == generators + (4 * 6 + 6) + (4 * 5 + 5)
    assert row.adapter.count('MGDLoss') == 2
    with distiller.capture() as capture:
        student(torch.zeros(2, 3, 64, 64))
    value = distiller.losses(capture, torch.zeros(2, 3, 64, 64), None)['loss_kd_term']
    value.backward()
    assert value > 0 and all(p.grad is not None for p in distiller.bank.parameters())


def test_losses_that_compare_any_channels_get_no_projection():
    for name, grid in (('AttentionTransferLoss', 'resize 8x8->4x4'), ('RelationLoss', 'none')):
        distiller, row = row_of(Net((4, 8, 8)), Net((6, 4, 4)), loss=dict(type=name))
        assert row.adapter == grid and not parameters(distiller), name


def test_vectors_stay_vectors():
    _, row = row_of(Net((4,)), Net((6,)))
    assert row.adapter.startswith('linear 4->6')


def test_logit_losses_refuse_maps():
    """Softmax over the last side of a map would be over a row of pixels."""
    with pytest.raises(DistillError, match=r'KLDivLoss compares \(\.\.\., C\) logits.*4x8x8.*ChannelWiseDivLoss'):
        row_of(Net((4, 8, 8)), Net((4, 8, 8)), loss=dict(type='KLDivLoss'))


def test_segmentation_losses_refuse_what_is_no_head():
    with pytest.raises(DistillError, match='Predictions of Identity cannot be read'):
        row_of(Net((4, 8, 8)), Net((4, 8, 8)), loss=dict(type='PixelwiseKLDivLoss'))


@pytest.mark.parametrize(
    'adapter, words',
    [
        (dict(type='auto', nrom=True), r'nrom.*norm'),
        (dict(type='auto', norm=1), 'norm must be True or False, got 1'),
        (dict(type='auto', prefix_tokens=-1), 'prefix_tokens must be a whole number.*-1'),
        (dict(type='auto', prefix_tokens=(1, 2, 3)), r'\(1, 2, 3\)'),
        ([], r"'auto', None, dict\(type=\.\.\.\) or a list of such, got \[\]"),
        ([dict(type='ResizeAdapter'), 'auto'], 'list of such'),
        ('conv', "got 'conv'"),
    ],
)
def test_misspelt_adapters_are_refused(adapter, words):
    with pytest.raises(DistillError, match=words):
        distiller_of(Net((4, 8, 8)), Net((6, 8, 8)), adapter=adapter)


def test_alpha_scales_distillation():
    student, teacher, inputs = Net((4, 8, 8)), Net((4, 8, 8), factor=2.0), torch.zeros(2, 3, 64, 64)
    values = {}
    for alpha in (None, 1.0, 0.25, 0.0):
        distiller = distiller_of(student, teacher)
        distiller.alpha = alpha
        distiller.dry_run(inputs, None, run)
        with distiller.capture() as capture:
            student(inputs)
        values[alpha] = distiller.losses(capture, inputs, None)['loss_kd_term'].item()
        assert distiller.active == (alpha != 0)
    assert values[None] == values[1.0] > 0 and values[0.0] == 0
    assert values[0.25] == pytest.approx(0.25 * values[1.0])
