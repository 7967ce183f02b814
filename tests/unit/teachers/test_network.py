"""Networks of timm by name, and how images are brought to them."""

import pytest
import torch
from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.teachers import ClassifierNetwork, create_network, data_config

timm = pytest.importorskip('timm')
VIT = 'test_vit'


def test_it_is_timms_own_network():
    torch.manual_seed(0)
    ours = create_network('test_resnet', num_classes=3, in_chans=1, drop_rate=0.5)
    torch.manual_seed(0)
    theirs = timm.create_model('test_resnet', num_classes=3, in_chans=1, drop_rate=0.5)
    assert ours.drop_rate == 0.5 and ours.num_classes == 3
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('name', [VIT, 'test_resnet', 'test_efficientnet', 'test_convnext'])
@pytest.mark.parametrize('size', [64, (32, 64)])
def test_input_size_of_any_network(name, size):
    """Transformers are built for it, convolutional networks take it as it is; both say so."""
    net = create_network(name, num_classes=3, input_size=size).eval()
    height, width = (size, size) if isinstance(size, int) else size
    assert net(torch.rand(1, 3, height, width)).shape == (1, 3)
    assert data_config(net).input_size == (height, width)


def test_a_transformer_is_built_for_one_resolution():
    net = create_network('vit_tiny_patch16_224', input_size=64, depth=1)
    assert net.patch_embed.img_size == (64, 64)
    with pytest.raises(AssertionError):
        net(torch.rand(1, 3, 96, 96))


def test_data_config():
    net = create_network(VIT)
    known, data = net.pretrained_cfg, data_config(net)
    assert data.mean == tuple(255 * v for v in known['mean']) and data.std == tuple(255 * v for v in known['std'])
    assert data.input_size == tuple(known['input_size'][1:])
    assert (data.interpolation, data.crop_pct) == (known['interpolation'], known['crop_pct'])


def test_data_config_of_grey_images():
    data = data_config(create_network('resnet18', in_chans=1))
    assert len(data.mean) == len(data.std) == 1
    assert data.mean[0] == pytest.approx(255 * (0.485 + 0.456 + 0.406) / 3)


def test_data_config_of_a_plain_module():
    data = data_config(nn.Linear(2, 2))
    assert data.mean == pytest.approx((123.675, 116.28, 103.53)) and data.input_size == (224, 224)


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('resnet81', {}, "timm has no model 'resnet81'; did you mean 'resnet18'"),
        (3, {}, 'model must be the name of a model of timm, .* got 3'),
        ('resnet18.nope', {}, "timm has no weights 'resnet18.nope'; .*'resnet18"),
        (
            'resnet18',
            dict(drop_pth_rate=0.1),
            "'resnet18' has no option 'drop_pth_rate': did you mean 'drop_path_rate'",
        ),
        # Beside a resolution that this network has no option for either.
        ('resnet18', dict(drop_pth_rate=0.1, input_size=64), "no option 'drop_pth_rate'"),
        (VIT, dict(drop_path=0.1, input_size=64), "no option 'drop_path': did you mean 'drop_path_rate'"),
        (VIT, dict(drop_path_rate='x'), "cannot be created with drop_path_rate='x' "),
        (VIT, dict(input_size=40), 'images of 40x40 do not divide into the 16x16 patches .* 32x32'),
        ('resnet18', dict(input_size=(1, 2, 3)), r'input_size must be a whole number >= 1 of pixels, or \(height'),
        ('resnet18', dict(num_classes='3'), "num_classes must be a whole number >= 1, got '3'"),
        ('resnet18', dict(in_chans=0), 'in_chans must be a whole number >= 1, got 0'),
    ],
)
def test_refused(name, options, message):
    with pytest.raises(DistillError, match=f'^model: .*{message}' if isinstance(name, str) else message) as error:
        create_network(name, **options)
    assert '\n' not in str(error.value)


def test_a_failure_of_the_network_itself_is_not_hidden(monkeypatch):
    def broken(name, img_size=None, **options):
        if img_size is not None:
            raise TypeError('something else')

    monkeypatch.setattr(timm, 'create_model', broken)
    with pytest.raises(DistillError, match='TypeError: something else'):
        create_network('resnet18', input_size=64)


def test_logits_have_a_module_of_their_own():
    net = ClassifierNetwork(create_network('test_resnet', num_classes=3), activation='sigmoid').eval()
    assert net.logits.num_classes == 3 and net.logits.activation == 'sigmoid'
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(net(images), net.net(images))


@pytest.mark.parametrize(
    'module, number, message',
    [
        (nn.Identity(), None, r'Identity must return class logits \(B, C\), but returned \(2, 3, 4, 4\)'),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), 3, 'predicts 5 classes, but 3 were expected'),
    ],
)
def test_what_is_no_classifier(module, number, message):
    with pytest.raises(DistillError, match=message):
        ClassifierNetwork(module, number)(torch.rand(2, 3, 4, 4))
