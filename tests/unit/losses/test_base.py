"""What a loss declares: by inheritance, by attributes of its own, or by nothing at all."""

import dataclasses

import pytest
import torch
from torch import nn

import kd_plugins.losses as losses
from kd_plugins.errors import DistillError
from kd_plugins.losses import DistillLoss, MGDLoss
from kd_plugins.losses.base import Declaration, declaration_of

ATTRIBUTES = tuple(DistillLoss.__annotations__)
SHIPPED = {
    name: loss for name in losses.__all__ if isinstance(loss := getattr(losses, name), type) and loss is not DistillLoss
}


class Everything:
    """No value is the default one."""

    consumes = 'masks'
    needs_target = True
    activation = 'sigmoid'
    any_channels = True
    any_grid = True
    images = 3


def test_the_defaults_are_those_of_a_loss_on_features():
    assert declaration_of(DistillLoss()) == Declaration(images=1)
    assert (Declaration().consumes, Declaration().activation) == ('features', None)
    others = dataclasses.asdict(Declaration()).items()
    assert not any(v for k, v in others if k not in ('consumes', 'activation', 'images'))


def test_a_module_without_a_word_is_a_loss_on_features():
    """torch's own, for one; asked on two images, because it may compare them."""
    silent = declaration_of(nn.MSELoss())
    assert silent.images == 2 and dataclasses.replace(silent, images=1) == declaration_of(DistillLoss())


@pytest.mark.parametrize('images', [0, 1.5, None, '2'])
def test_a_number_of_images_is_a_number(images):
    with pytest.raises(DistillError, match=f'Mine.images must be a whole number >= 1, got {images!r}'):
        declaration_of(type('Mine', (DistillLoss,), {'images': images})())


def test_losses_that_compare_the_images_of_a_batch():
    """On fewer images than they declare they are 0, whatever student and teacher are; on as many they are not."""
    generator = torch.Generator().manual_seed(0)
    relations = [dict(), dict(angle_weight=0.0), dict(distance_weight=0.0)]
    found = [losses.RelationLoss(**options) for options in relations]
    for loss in found:
        student, teacher = torch.rand(2, loss.images, 5, generator=generator)
        assert loss(student, teacher) > 1e-3
        assert loss(student[:-1], teacher[:-1]) < 1e-9
    assert declaring('images', 1) == set(SHIPPED) - {'RelationLoss'}


@pytest.mark.parametrize('base', [DistillLoss, nn.Module])
def test_every_attribute_is_read_with_and_without_the_base(base):
    found = declaration_of(type('Mine', (Everything, base), {})())
    assert set(ATTRIBUTES) == {key for key in vars(Everything) if not key.startswith('_')}
    for key in ATTRIBUTES:
        assert getattr(found, key) == getattr(Everything, key) != getattr(Declaration(), key)
    assert not found.built_per_level


@pytest.mark.parametrize('base', [DistillLoss, nn.Module])
def test_attributes_may_belong_to_the_instance(base):
    """One class for two kinds of classes, chosen by an option."""

    class Mine(base):
        def __init__(self, many):
            super().__init__()
            self.activation = 'sigmoid' if many else 'softmax'

    assert [declaration_of(Mine(many)).activation for many in (True, False)] == ['sigmoid', 'softmax']


@pytest.mark.parametrize('base', [DistillLoss, nn.Module])
def test_only_a_for_channels_of_its_own_makes_a_loss_per_level(base):
    class Mine(base):
        def for_channels(self, channels):
            return nn.Conv2d(channels, channels, 1)

    class Child(Mine):
        pass

    assert declaration_of(Mine()).built_per_level and declaration_of(Child()).built_per_level
    assert not declaration_of(base()).built_per_level


def test_the_loss_of_the_base_is_itself_for_any_channels():
    loss = DistillLoss()
    assert loss.for_channels(8) is loss
    made = MGDLoss(mask_ratio=0.3).for_channels(8)
    assert made.mask_ratio == 0.3 and made.generator.channels == 8


@pytest.mark.parametrize('base', [DistillLoss, nn.Module])
@pytest.mark.parametrize('activation', ['Softmax', 'relu', True, 0, ''])
def test_an_activation_that_does_not_exist_is_refused(base, activation):
    mine = type('Mine', (base,), {'activation': activation})
    with pytest.raises(DistillError, match=r"^Mine\.activation must be None, 'softmax' or 'sigmoid', got ") as error:
        declaration_of(mine())
    assert repr(activation) in str(error.value)


def test_forms_add_their_own_names():
    assert declaration_of(type('Mine', (DistillLoss,), {'consumes': 'keypoints'})()).consumes == 'keypoints'


def test_a_declaration_is_a_fixed_value():
    declared = declaration_of(losses.KLDivLoss())
    with pytest.raises(dataclasses.FrozenInstanceError):
        declared.consumes = 'features'
    assert declared == declaration_of(losses.KLDivLoss(temperature=1.0)) != declaration_of(losses.BinaryKLDivLoss())
    assert hash(declared) == hash(declaration_of(losses.HardLabelLoss()))


def test_declaring_costs_no_parameter_and_no_state():
    loss = DistillLoss()
    assert not list(loss.parameters()) and not loss.state_dict() and isinstance(loss, nn.Module)


@pytest.mark.parametrize('loss', SHIPPED.values(), ids=SHIPPED)
def test_every_loss_here_declares_by_the_base(loss):
    assert issubclass(loss, DistillLoss)
    assert 'consumes' in vars(loss), 'says what it compares in its own file'
    declared = declaration_of(loss())
    assert all(getattr(loss(), key) == getattr(declared, key) for key in ATTRIBUTES)


def declaring(key, value=True):
    return {name for name, loss in SHIPPED.items() if getattr(declaration_of(loss()), key) == value}


def test_what_the_losses_here_declare():
    """By the papers: a change here changes what users' terms are given."""
    consumers = {
        'features': {
            'AttentionTransferLoss',
            'ChannelWiseDivLoss',
            'CosineFeatureLoss',
            'FeatureMSELoss',
            'MGDLoss',
            'PearsonLoss',
            'RelationLoss',
        },
        'logits': {
            'BalancedKLDivLoss',
            'BinaryKLDivLoss',
            'DISTLoss',
            'DKDLoss',
            'HardLabelLoss',
            'KLDivLoss',
            'LogitMSELoss',
            'OFALoss',
        },
        'predictions': {'AutoBoxLoss', 'BoxIoULoss', 'BoxL1Loss', 'LocalizationDistillLoss', 'YOLOLogitLoss'},
        'segmentation': {'PixelwiseKLDivLoss'},
        'masks': {'MaskKLDivLoss'},
    }
    assert {kind: declaring('consumes', kind) for kind in consumers} == consumers
    assert declaring('needs_target') == {'DKDLoss', 'OFALoss', 'PixelwiseKLDivLoss'}
    assert declaring('any_channels') == {'AttentionTransferLoss', 'RelationLoss'}
    assert declaring('any_grid') == {'RelationLoss'}
    assert declaring('built_per_level') == {'MGDLoss'}
    on_logits = consumers['logits']
    assert declaring('activation', 'softmax') & on_logits == on_logits - {'BinaryKLDivLoss', 'LogitMSELoss'}
    assert declaring('balances') == {'BalancedKLDivLoss'}
    assert declaring('activation', 'sigmoid') & on_logits == {'BinaryKLDivLoss'}
    # What compares no classes suits any.
    assert declaring('activation', None) >= consumers['features'] | consumers['predictions'] | consumers['masks']


def test_declared_tolerances_hold():
    """Features with other channels, or on another grid, are taken by exactly the losses that say so."""
    generator = torch.Generator().manual_seed(0)
    student, channels, grid = (torch.rand(3, *s, generator=generator) for s in ((4, 4, 4), (6, 4, 4), (4, 2, 2)))

    def takes(loss, teacher):
        try:
            return loss(student, teacher).dim() == 0
        except DistillError:
            return False

    # A loss with parts of its own is built for the teacher's channels, and the student brought to them.
    on_features = declaring('consumes', 'features') - declaring('built_per_level')
    assert {n for n in on_features if takes(SHIPPED[n](), student)} == on_features
    assert {n for n in on_features if takes(SHIPPED[n](), channels)} == declaring('any_channels')
    assert {n for n in on_features if takes(SHIPPED[n](), grid)} == declaring('any_grid')
