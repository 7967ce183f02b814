"""Properties that every loss has, one table of losses times one test per property."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import softplus

import kd_plugins.losses as losses
from kd_plugins.errors import DistillError
from kd_plugins.losses import (
    AttentionTransferLoss,
    AutoBoxLoss,
    BalancedKLDivLoss,
    BinaryKLDivLoss,
    BoxIoULoss,
    BoxL1Loss,
    ChannelWiseDivLoss,
    CosineFeatureLoss,
    DISTLoss,
    DKDLoss,
    FeatureMSELoss,
    HardLabelLoss,
    KLDivLoss,
    LocalizationDistillLoss,
    LogitMSELoss,
    MaskKLDivLoss,
    MGDLoss,
    OFALoss,
    PearsonLoss,
    PixelwiseKLDivLoss,
    RelationLoss,
    YOLOLogitLoss,
)
from kd_plugins.predictions.dense import DensePredictions

POSITIONS = 8


def logits(values):
    return values[0]


def features(values):
    return values[0].transpose(1, 2).unflatten(-1, (2, 4))


def masks(values):
    return values[4]


def maps(values):
    """Features that vary over the grid, and stay so in the test of large gaps."""
    return values[4]


def activations(values):
    """Features after an activation, whose sign attention does not ignore."""
    return softplus(values[4])


def embeddings(values):
    """Several images to relate, also of a batch of two."""
    return values[0].flatten(0, 1)


def predictions(values, activation='sigmoid', obj=True, box_coding='xywh', dist=True):
    cls, obj_values, ltrb, box, bins = values
    return DensePredictions(
        cls=cls.sigmoid() if activation == 'probability' else cls,
        activation=activation,
        level_sizes=((2, 3), (1, 2)),
        strides=(8.0, 16.0),
        points=torch.zeros(POSITIONS, 2, dtype=cls.dtype),
        obj=obj_values if obj else None,
        ltrb=ltrb,
        dist=bins if dist else None,
        box=box if box_coding else None,
        box_coding=box_coding,
    )


def raw(batch, seed, dtype=torch.float64, spread=1.5):
    """The numbers that logits, features and predictions are built from, each ``(B, 8, ...)``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((5,), (1,), (4,), (4,), (4, 6))
    return [
        (torch.randn(batch, POSITIONS, *s, generator=generator, dtype=torch.float64) * spread).to(dtype) for s in shapes
    ]


def probability(values):
    return predictions(values, activation='probability', obj=False)


def no_raw_box(values):
    return predictions(values, box_coding=None)


def positive_sizes(values):
    """Boxes of at least one stride; an area cannot be negative."""
    values = list(values)
    values[2] = softplus(values[2]) + 0.5
    return predictions(values, box_coding=None)


class WithLabels(torch.nn.Module):
    """A loss that takes labels, with the same ones at every call."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.consumes = loss, loss.consumes

    def forward(self, student, teacher):
        target = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]).expand(student.shape[:-1])
        return self.loss(student, teacher, target)


class WithSoftLabels(WithLabels):
    """Two classes per position, smoothed, as Mixup gives them."""

    def forward(self, student, teacher):
        first = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]).expand(student.shape[:-1])
        target = sum(w * torch.nn.functional.one_hot((first + k) % 5, 5) for k, w in ((0, 0.63), (1, 0.27))) + 0.02
        return self.loss(student, teacher, target)


class WithLabelMap(WithLabels):
    """Two rows of four pixels, the same in every image; one pixel does not count."""

    def forward(self, student, teacher):
        return self.loss(student, teacher, torch.tensor([[0, 1, 2, 3], [4, 255, 1, 2]]).expand(len(student), 2, 4))


def mgd_of_the_whole_map():
    """A generator that does nothing: the random and the trained part have tests of their own."""
    loss = MGDLoss(mask_ratio=0.0, channels=8)
    loss.generator = torch.nn.Identity()
    return loss


CASES = {
    'kl': (KLDivLoss(), logits),
    'kl-T1': (KLDivLoss(temperature=1.0), logits),
    'kl-teacher-T': (KLDivLoss(temperature=2.0, teacher_temperature=4.0), logits),
    'kl-standardize': (KLDivLoss(temperature=2.0, standardize=True), logits),
    'balanced': (BalancedKLDivLoss(counts=[500, 200, 80, 20, 3]), logits),
    'balanced-equal': (BalancedKLDivLoss(temperature=1.0, counts=[7] * 5), logits),
    'binary': (BinaryKLDivLoss(), logits),
    'binary-foreground': (BinaryKLDivLoss(temperature=2.0, foreground=True), logits),
    'mse': (FeatureMSELoss(), features),
    'logit-mse': (LogitMSELoss(), logits),
    'logit-mse-T': (LogitMSELoss(temperature=3.0), logits),
    'auto-box': (AutoBoxLoss(), predictions),
    'yolo': (YOLOLogitLoss(), predictions),
    'yolo-uniform': (YOLOLogitLoss(2.0, 0.5, 3.0, 0.1, foreground=False), predictions),
    'yolo-box-foreground': (YOLOLogitLoss(foreground='box'), no_raw_box),
    'yolo-probability': (YOLOLogitLoss(), probability),
    'ld': (LocalizationDistillLoss(), predictions),
    'ld-uniform': (LocalizationDistillLoss(temperature=1.0, foreground=False), predictions),
    'l1': (BoxL1Loss(), predictions),
    'l1-uniform': (BoxL1Loss(foreground=False), no_raw_box),
    'iou': (BoxIoULoss(), positive_sizes),
    'iou-uniform': (BoxIoULoss(foreground=False), positive_sizes),
    'mask': (MaskKLDivLoss(), masks),
    'mask-T2': (MaskKLDivLoss(temperature=2.0), masks),
    'dkd': (WithLabels(DKDLoss()), logits),
    'dkd-target': (WithLabels(DKDLoss(alpha=2.0, beta=0.0, temperature=1.0)), logits),
    'dkd-soft': (WithSoftLabels(DKDLoss()), logits),
    'dist': (DISTLoss(), logits),
    'dist-inter': (DISTLoss(beta=2.0, gamma=0.0, temperature=4.0), logits),
    'dist-intra': (DISTLoss(beta=0.0), logits),
    'ofa': (WithLabels(OFALoss(gamma=1.5)), logits),
    'ofa-soft': (WithSoftLabels(OFALoss(gamma=1.5, temperature=2.0)), logits),
    'ofa-author': (WithLabels(OFALoss(gamma=1.5, form='author')), logits),
    'hard': (HardLabelLoss(), logits),
    'pixelwise': (PixelwiseKLDivLoss(), features),
    'pixelwise-labels': (WithLabelMap(PixelwiseKLDivLoss(temperature=2.0)), features),
    'pixelwise-lean': (WithLabelMap(PixelwiseKLDivLoss(temperature=2.0, lean=True)), features),
    'pixelwise-sigmoid': (PixelwiseKLDivLoss(sigmoid=True), features),
    'cwd': (ChannelWiseDivLoss(), maps),
    'cwd-T1': (ChannelWiseDivLoss(temperature=1.0), maps),
    'pearson': (PearsonLoss(), maps),
    'cosine': (CosineFeatureLoss(), features),
    'mgd': (mgd_of_the_whole_map(), features),
    'attention': (AttentionTransferLoss(), activations),
    'attention-paper': (AttentionTransferLoss(form='paper', p=1.5), activations),
    'relation': (RelationLoss(), embeddings),
    'relation-distance': (RelationLoss(angle_weight=0.0), embeddings),
}


def every_loss_but(*names):
    """Every case but those that do not have the property by their nature; what they have instead is in their files."""
    kept = {k: v for k, v in CASES.items() if k not in names}
    assert len(kept) == len(CASES) - len(names)
    return pytest.mark.parametrize('loss, build', kept.values(), ids=kept)


every_loss = every_loss_but()
# Cross-entropies; least for another student than an equal one, as with a temperature of the teacher's own.
OFA = ('ofa', 'ofa-soft', 'ofa-author')
every_divergence = every_loss_but('hard', 'kl-teacher-T', 'balanced', 'logit-mse-T', *OFA)
# Equal for a student that is turned, mirrored or enlarged, and for any embedding size; they couple the images.
RELATIONS = ('relation', 'relation-distance')


def leaves(values):
    return [v.clone().requires_grad_() for v in values]


def used_gradients(loss_value, values):
    return [g for g in torch.autograd.grad(loss_value, values, allow_unused=True) if g is not None]


@every_divergence
def test_zero_with_zero_gradient_at_equality(loss, build):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        student = leaves(raw(2, 0, dtype, spread=5.0))
        value = loss(build(student), build(raw(2, 0, dtype, spread=5.0)))
        assert abs(value.item()) < 1e-7
        gradients = used_gradients(value, student)
        assert gradients and all(g.abs().max() < 1e-6 for g in gradients)


@every_loss
def test_positive_scalar_elsewhere(loss, build):
    value = loss(build(raw(2, 0)), build(raw(2, 1)))
    assert value.shape == () and value > 1e-3


@every_loss_but(*RELATIONS, *OFA)
def test_gradient_descent_reaches_the_teacher(loss, build):
    teacher, student = raw(2, 1), leaves(raw(2, 0))
    value = loss(build(student), build(teacher))
    value.backward()
    used = [(s, t) for s, t in zip(student, teacher, strict=True) if s.grad is not None]
    towards_teacher = sum(((t - s) * -s.grad).sum() for s, t in used)
    assert towards_teacher > 0
    with torch.no_grad():
        step = [s if s.grad is None else s - 1e-3 * s.grad for s in student]
    assert loss(build(step), build(teacher)) < value
    optimizer = torch.optim.Adam([s for s, _ in used], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss(build(student), build(teacher)).backward()
        optimizer.step()
    assert loss(build(student), build(teacher)) < 0.02 * value


@every_loss
def test_gradcheck(loss, build):
    teacher, student = build(raw(2, 1)), leaves(raw(2, 0))
    assert torch.autograd.gradcheck(lambda *values: loss(build(values), teacher), student)


@every_loss
def test_no_gradient_to_the_teacher(loss, build):
    student, teacher = leaves(raw(2, 0)), leaves(raw(2, 1))
    loss(build(student), build(teacher)).backward()
    assert all(t.grad is None for t in teacher)
    assert any(s.grad is not None for s in student)


@every_loss_but('dist-intra', *RELATIONS)  # all positions are equal here
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_at_logit_gaps_of_200(loss, build, dtype):
    """Finite, with finite gradients, and as exact as float32 on the same numbers."""
    # Objectness is a single channel: -100, so that the teacher's is +100 and its confidence 1.
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
    student = leaves([(100 * signs[: v.shape[-1]]).expand_as(v).to(dtype) for v in raw(2, 0)])
    teacher = [-v.detach() for v in student]
    value = loss(build(student), build(teacher))
    assert value.dtype == torch.float32 and torch.isfinite(value) and value > 0
    gradients = used_gradients(value, student)
    assert gradients and all(torch.isfinite(g).all() and g.dtype == dtype for g in gradients)
    exact = loss(build([v.detach().double() for v in student]), build([v.double() for v in teacher]))
    if build is not probability:  # whose floor of 1e-6 below 1 differs between float32 and float64
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)


@every_loss
def test_autocast_changes_nothing(loss, build):
    student, teacher = raw(2, 0, torch.float32), raw(2, 1, torch.float32)
    plain = loss(build(student), build(teacher))
    student, teacher = build(leaves(student)), build(teacher)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32 and torch.equal(value.detach(), plain)


@every_loss
def test_float64_is_computed_in_float64(loss, build):
    value = loss(build(raw(2, 0)), build(raw(2, 1)))
    single = loss(build([v.float() for v in raw(2, 0)]), build([v.float() for v in raw(2, 1)]))
    assert value.dtype == torch.float64 and single.dtype == torch.float32
    assert value.item() == pytest.approx(single.item(), rel=1e-5) and value.item() != single.item()


@every_loss_but('pearson', 'dist', 'dist-intra', *RELATIONS)
def test_loss_of_a_batch_is_the_mean_over_its_images(loss, build):
    """So it does not depend on batch size, accumulation or the number of GPUs; also with confidence weights."""
    student, teacher = raw(3, 0), raw(3, 1)
    # The teacher sees little in the first image and much in the last: batch-wide normalisation would show.
    for i, shift in enumerate((-6.0, 0.0, 2.0)):
        teacher[0][i] += shift
        teacher[1][i] += shift
    whole = loss(build(student), build(teacher))
    single = [loss(build([v[i : i + 1] for v in student]), build([v[i : i + 1] for v in teacher])) for i in range(3)]
    assert whole.item() == pytest.approx(sum(v.item() for v in single) / 3, rel=1e-12)
    doubled = loss(build([torch.cat([v, v]) for v in student]), build([torch.cat([v, v]) for v in teacher]))
    assert doubled.item() == pytest.approx(whole.item(), rel=1e-12)


@every_loss
def test_no_images_give_zero(loss, build):
    student = leaves([v[:0] for v in raw(1, 0)])
    value = loss(build(student), build([v[:0] for v in raw(1, 1)]))
    value.backward()
    assert value.item() == 0.0


@every_loss
def test_module_is_stateless_and_copies(loss, build):
    assert loss.consumes in ('features', 'logits', 'predictions', 'masks', 'segmentation')
    assert not loss.state_dict() and not list(loss.parameters())
    expected = loss(build(raw(2, 0)), build(raw(2, 1)))
    for clone in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(clone(build(raw(2, 0)), build(raw(2, 1))), expected)
        assert repr(clone) == repr(loss)


def test_hyper_parameters_are_shown():
    assert repr(KLDivLoss(3.0)) == 'KLDivLoss(temperature=3.0, standardize=False, teacher_temperature=None)'


@pytest.mark.parametrize('name', ['kl', 'kl-teacher-T', 'kl-standardize', 'binary', 'ld', 'mask', 'cwd', 'dist'])
def test_temperature_is_read_at_every_call(name):
    loss, build = CASES[name]
    loss = copy.deepcopy(loss)
    before = loss(build(raw(2, 0)), build(raw(2, 1)))
    loss.temperature = loss.temperature * 3
    assert loss(build(raw(2, 0)), build(raw(2, 1))) != before


NUMBERS = (-1.0, math.nan, math.inf, '1', None, True, [1.0])
BAD = [
    *[
        (cls, 'temperature', v)
        for cls in (
            KLDivLoss,
            LogitMSELoss,
            BalancedKLDivLoss,
            BinaryKLDivLoss,
            ChannelWiseDivLoss,
            DISTLoss,
            DKDLoss,
            LocalizationDistillLoss,
            MaskKLDivLoss,
            OFALoss,
            PixelwiseKLDivLoss,
        )
        for v in (0, *NUMBERS)
    ],
    *[(YOLOLogitLoss, name, v) for name in ('obj_weight', 'box_weight', 'cls_weight', 'scale') for v in NUMBERS],
    *[
        (cls, 'foreground', v)
        for cls in (BinaryKLDivLoss, BoxIoULoss, BoxL1Loss, LocalizationDistillLoss)
        for v in ('box', 'yes', 1, None)
    ],
    *[(DKDLoss, name, v) for name in ('alpha', 'beta') for v in NUMBERS],
    *[(DISTLoss, name, v) for name in ('beta', 'gamma') for v in NUMBERS],
    *[(BalancedKLDivLoss, 'beta', v) for v in (1, 1.5, *NUMBERS)],
    *[(BalancedKLDivLoss, 'counts', v) for v in (5, 'many', [], [1, -1], [1, 2.5], [True, 1])],
    *[(OFALoss, 'gamma', v) for v in (0, *NUMBERS)],
    *[(OFALoss, 'form', v) for v in ('code', 'Paper', None)],
    *[(YOLOLogitLoss, 'foreground', v) for v in ('cls', 1, None)],
    *[(KLDivLoss, 'standardize', v) for v in ('yes', 1, None)],
    *[(PixelwiseKLDivLoss, 'alpha', v) for v in (1.5, *NUMBERS) if v is not None],
    *[(PixelwiseKLDivLoss, 'ignore_index', v) for v in (255.0, '255', None, True)],
    *[(PixelwiseKLDivLoss, name, v) for name in ('sigmoid', 'lean') for v in ('yes', 1, 0)],
    *[(MGDLoss, 'mask_ratio', v) for v in (1, 1.5, *NUMBERS)],
    *[(MGDLoss, 'channels', v) for v in (0, 2.0, '8', True)],
    *[(AttentionTransferLoss, 'form', v) for v in ('squared', 'Paper', None)],
    *[(AttentionTransferLoss, 'p', v) for v in (0, 0.5, *NUMBERS)],
    *[(RelationLoss, name, v) for name in ('distance_weight', 'angle_weight') for v in NUMBERS],
]


@pytest.mark.parametrize('cls, name, value', BAD)
def test_bad_hyper_parameters_are_refused(cls, name, value):
    with pytest.raises(DistillError, match=name) as error:
        cls(**{name: value})
    assert repr(value) in str(error.value)


def test_all_weights_zero_is_refused():
    with pytest.raises(DistillError, match='all 0'):
        YOLOLogitLoss(0, 0, 0)
    with pytest.raises(DistillError, match='both 0'):
        RelationLoss(0, 0)


@every_loss_but(*RELATIONS)
def test_different_shapes_are_refused(loss, build):
    """Never broadcast."""
    student = raw(2, 0)
    with pytest.raises(DistillError, match=r'\(2, .*\(1, '):
        loss(build(student), build([v[:1] for v in raw(2, 1)]))


@pytest.mark.parametrize(
    'function',
    [
        losses.kl_div,
        losses.dist,
        losses.binary_kl_div,
        losses.feature_mse,
        losses.channel_wise_div,
        losses.pearson,
        losses.cosine_feature,
        losses.attention_transfer,
        losses.relation,
        losses.pixelwise_kl_div,
    ],
)
def test_something_else_than_a_tensor_is_refused(function):
    tensor = torch.zeros(2, 3, 4, 4)
    with pytest.raises(DistillError, match='student must be one tensor, got tuple'):
        function((tensor,), tensor)
    with pytest.raises(DistillError, match='teacher must be one tensor, got list'):
        function(tensor, [tensor])


@pytest.mark.parametrize('function', [losses.kl_div, losses.binary_kl_div, losses.localization_distill])
def test_functions_check_the_temperature(function):
    with pytest.raises(DistillError, match='temperature'):
        function(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4, 3), temperature=0.0)


def test_every_loss_a_config_can_name_is_in_the_table():
    exported = {cls for name in losses.__all__ if isinstance(cls := getattr(losses, name), type)}
    assert exported == {type(getattr(loss, 'loss', loss)) for loss, _ in CASES.values()}
    assert all(issubclass(cls, torch.nn.Module) for cls in exported)


def test_needs_torch_only():
    code = (
        'import sys, kd_plugins.losses, kd_plugins.adapters\n'
        "heavy = {'mmengine', 'mmcv', 'mmdet', 'ultralytics', 'timm', 'kd_plugins.predictions'} & set(sys.modules)\n"
        'assert not heavy, heavy'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
