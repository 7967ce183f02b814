"""What terms become: adapters by shape, losses per level, tokens and maps, what each loss may compare."""

import pytest
import torch
from torch import nn

from kd_plugins.distiller import Session, build_terms
from kd_plugins.errors import DistillError
from kd_plugins.losses import attention_transfer, feature_mse, kl_div
from kd_plugins.predictions import ClassLogits
from kd_plugins.teachers import FrozenTeacher


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


def distiller_of(student, teacher, /, **term):
    term = {'loss': dict(type='FeatureMSELoss'), 'student': 'body', 'teacher': 'body', **term}
    held = FrozenTeacher(teacher, run, lambda inputs, samples: inputs, name='net')
    return Session(student, held, build_terms(dict(term=term)))


def row_of(student, teacher, /, size=(64, 64), **term):
    distiller = distiller_of(student, teacher, **term)
    (row,) = distiller.check(torch.zeros(3, 3, *size), None)
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


def test_auto_may_stand_in_a_chain_and_the_teachers_side_is_brought_to_a_form():
    """Normalised necks under CWD, as MMYOLO's distilled RTMDet, against batch normalisation without parameters."""
    from kd_plugins.losses import channel_wise_div

    student, teacher = Net((4, 8, 8), (4, 4, 4)), Net((6, 8, 8), (6, 4, 4), factor=3.0)
    norm = dict(type='ChannelNorm')
    distiller, row = row_of(
        student, teacher, loss=dict(type='ChannelWiseDivLoss'), adapter=['auto', norm], teacher_adapter=norm
    )
    assert row.adapter == 'conv 1x1 4->6 (30 params), channel norm; teacher: channel norm'
    with distiller.capture() as capture:
        student(torch.zeros(2, 3, 64, 64))
    value = distiller.losses(capture, torch.zeros(2, 3, 64, 64), None)['loss_kd_term']
    expected = []
    for shape, adapter in zip(((8, 8), (4, 4)), distiller.bank._modules['term']['adapters'], strict=True):
        ours, theirs = Net._level((4, *shape), 2), 3.0 * Net._level((6, *shape), 2)
        plain = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
        expected.append(channel_wise_div(plain(adapter[0](ours, theirs)), plain(theirs)))
    assert value.item() == pytest.approx(sum(expected).item() / 2, rel=1e-5)
    value.backward()
    assert all(p.grad.abs().sum() > 0 for p in distiller.bank.parameters() if p.dim() > 1)


@pytest.mark.parametrize('adapter, shown', [('auto', 'resize 4x4->8x8'), (dict(type='ResizeAdapter'), 'resize')])
def test_the_teacher_may_be_brought_to_the_students_grid(adapter, shown):
    """Then nothing is left for the student's side to resample."""
    _, row = row_of(Net((4, 8, 8)), Net((4, 4, 4)), teacher_adapter=adapter)
    assert row.adapter.startswith('none; teacher: ') and shown in row.adapter
    with pytest.raises(DistillError, match='teacher_adapter has parameters to train'):
        row_of(Net((4, 8, 8)), Net((6, 4, 4)), teacher_adapter='auto')


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
        ([dict(type='ResizeAdapter'), 'conv'], 'list of such'),
        ([dict(type='ResizeAdapter'), dict(type='auto', nrom=True)], r'nrom.*norm'),
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
        distiller.check(inputs, None)
        with distiller.capture() as capture:
            student(inputs)
        values[alpha] = distiller.losses(capture, inputs, None)['loss_kd_term'].item()
        assert distiller.active == (alpha != 0)
    assert values[None] == values[1.0] > 0 and values[0.0] == 0
    assert values[0.25] == pytest.approx(0.25 * values[1.0])


class Attending(Net):
    """Gives its output to the dropout of an attention module, as probabilities."""

    def __init__(self, *shapes, owner='Attention', **options):
        super().__init__(*shapes, **options)
        self.attn = type(owner, (nn.Module,), {})()
        self.attn.attn_drop = nn.Dropout(0.5)

    def forward(self, x):
        return [self.attn.attn_drop(level.softmax(-1)) for level in self.body(torch.zeros(len(x) * self.windows, 1))]

    windows = 1


ATTENTION = dict(loss=dict(type='AttentionTransferLoss'), teacher='attn.attn_drop')


def value_of(distiller, student, size=(64, 64), samples=None):
    inputs = torch.zeros(2, 3, *size)
    with distiller.capture() as capture:
        student(inputs)
    return distiller.losses(capture, inputs, samples)['loss_kd_term']


@pytest.mark.parametrize('size, grid', [((64, 64), (4, 4)), ((32, 128), (2, 8))])
def test_attention_of_the_class_token_meets_a_map(size, grid):
    student, teacher = Net((5, *grid)), Attending((3, 17, 17))
    distiller, row = row_of(student, teacher, size=size, **ATTENTION)
    assert row.teacher_shape == f'3x{grid[0]}x{grid[1]}' and row.adapter == 'none' and not parameters(distiller)
    attended = Net._level((3, 17, 17), 2).softmax(-1)[:, :, 0, 1:].unflatten(2, grid)
    expected = attention_transfer(Net._level((5, *grid), 2), attended)
    assert value_of(distiller, student, size).item() == pytest.approx(expected.item(), rel=1e-5)


def test_attention_may_be_the_students():
    student = Attending((3, 17, 17))
    term = dict(ATTENTION, student='attn.attn_drop', teacher='body')
    distiller, row = row_of(student, Net((5, 8, 8)), **term)
    assert (row.student_shape, row.adapter) == ('3x4x4', 'resize 4x4->8x8')
    value_of(distiller, student).backward()
    assert student.scale.grad.abs() > 0


def test_prefix_tokens_of_attention():
    row_of(Net((5, 4, 4)), Attending((3, 18, 18)), **ATTENTION)
    words = r"teacher 'attn\.attn_drop': 18 tokens are no patch grid of a 64x64 image behind 1"
    with pytest.raises(DistillError, match=words):
        row_of(Net((5, 4, 4)), Attending((3, 18, 18)), adapter=dict(type='auto', prefix_tokens=(None, 1)), **ATTENTION)


def test_attention_is_left_as_it_is_without_an_automatic_adapter():
    student = Attending((3, 17, 17), factor=2.0)
    term = dict(loss=dict(type='FeatureMSELoss'), student='attn.attn_drop', teacher='attn.attn_drop', adapter=None)
    distiller, row = row_of(student, Attending((3, 17, 17)), **term)
    assert row.student_shape == row.teacher_shape == '3x17x17'
    level = Net._level((3, 17, 17), 2)
    expected = feature_mse((2 * level).softmax(-1), level.softmax(-1))
    assert value_of(distiller, student).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize('owner, windows', [('Attention', 4), ('WindowAttention', 1)])
def test_attention_within_windows_is_refused(owner, windows):
    teacher = Attending((3, 16, 16), owner=owner)
    teacher.windows = windows
    words = f"teacher 'attn.attn_drop': {owner} attends within windows of the image.*tap the attention of a ViT"
    with pytest.raises(DistillError, match=words):
        row_of(Net((5, 4, 4)), teacher, **ATTENTION)


class Classifier(Net):
    """A feature, and logits that pass the module by which they are tapped."""

    def __init__(self, *shapes, classes=4, activation='softmax', **options):
        super().__init__(*shapes, **options)
        self.logits = ClassLogits(classes, activation)
        self.classes = classes

    def forward(self, x):
        self.body(x)
        return self.logits(self.scale * self._level((self.classes,), len(x)))


KL = dict(loss=dict(type='KLDivLoss'), teacher='logits', adapter=dict(type='LogitProjector'))


@pytest.mark.parametrize(
    'shape, shown', [((6, 4, 4), '6x4x4'), ((17, 6), '17x6'), ((6,), '6'), ((4, 4, 6), '6x4x4')], ids=str
)
def test_a_feature_is_projected_to_the_teachers_classes(shape, shown):
    student, teacher = Classifier(shape), Classifier((1, 1, 1), classes=3)
    distiller, row = row_of(student, teacher, **KL)
    count = 6 * 2 + (6 * 6 + 6) + (6 * 3 + 3)
    assert (row.student_shape, row.teacher_shape) == (shown, '3')
    assert row.adapter == f'projector 6->6->3 logits ({count} params)' and parameters(distiller) == count
    (projector,) = distiller.bank.get_submodule('term.adapters')
    feature = Net._level(shape, 2)
    expected = kl_div(projector(feature.permute(0, 3, 1, 2) if shape == (4, 4, 6) else feature, None), teacher(feature))
    value = value_of(distiller, student)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    assert student.scale.grad is not None and all(p.grad is not None for p in projector.parameters())


def test_a_projector_makes_the_teachers_classes_and_the_shared_ones_count():
    student, teacher = Classifier((6, 4, 4), classes=5), Classifier((1, 1, 1), classes=7)
    distiller = distiller_of(student, teacher, **KL)
    distiller.set_classes(((0, 3, 4), (6, 2, 0)))
    (row,) = distiller.check(torch.zeros(2, 3, 64, 64), None)
    assert row.adapter.startswith('projector 6->6->7 logits')
    (projector,) = distiller.bank.get_submodule('term.adapters')
    logits = Net._level((7,), 2)[:, [6, 2, 0]]
    expected = kl_div(projector(Net._level((6, 4, 4), 2), None)[:, [6, 2, 0]], logits)
    assert value_of(distiller, student).item() == pytest.approx(expected.item(), rel=1e-5)


def test_labels_reach_a_loss_on_projected_logits():
    from kd_plugins.losses import dkd

    student, teacher = Classifier((6, 4, 4), classes=5), Classifier((1, 1, 1), classes=7)
    distiller = distiller_of(student, teacher, **{**KL, 'loss': dict(type='DKDLoss')})
    distiller.set_classes(((0, 3, 4), (6, 2, 0)))
    distiller.host.targets = lambda inputs, samples: torch.tensor([4, 1])
    distiller.check(torch.zeros(2, 3, 64, 64), None)
    (projector,) = distiller.bank.get_submodule('term.adapters')
    ours, theirs = (z[:, [6, 2, 0]] for z in (projector(Net._level((6, 4, 4), 2), None), Net._level((7,), 2)))
    # Class 4 is the third of those that are compared; class 1, of the second image, the teacher does not know.
    expected = dkd(ours[:1], theirs[:1], torch.tensor([2]))
    assert value_of(distiller, student).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(loss=dict(type='FeatureMSELoss')), 'LogitProjector makes class logits, and FeatureMSELoss compares feat'),
        (dict(loss=dict(type='PixelwiseKLDivLoss')), 'PixelwiseKLDivLoss compares segmentation; take a loss on logits'),
        (dict(adapter=dict(type='ResizeAdapter')), 'KLDivLoss compares logits, which take no adapter'),
        (dict(adapter=[dict(type='LogitProjector')]), 'KLDivLoss compares logits, which take no adapter'),
        (dict(adapter=dict(type='LogitProjector', hiden=3)), 'hiden.*hidden'),
        (dict(loss=dict(type='BinaryKLDivLoss')), 'BinaryKLDivLoss does not suit this classifier'),
        (dict(teacher='body'), 'Predictions of Identity cannot be read'),
    ],
)
def test_where_a_projector_does_not_fit(changes, words):
    with pytest.raises(DistillError, match=words):
        row_of(Classifier((6, 4, 4)), Classifier((6, 4, 4)), **{**KL, **changes})


def test_a_projector_takes_one_feature():
    with pytest.raises(DistillError, match=r"'body' has 2 tensors 6x4x4, 6x2x2; pick the feature.*'body\[0\]'"):
        row_of(Classifier((6, 4, 4), (6, 2, 2)), Classifier((6, 4, 4)), **KL)
    _, row = row_of(Classifier((6, 4, 4), (6, 2, 2)), Classifier((6, 4, 4)), student='body[1]', **KL)
    assert row.student_shape == '6x2x2'
