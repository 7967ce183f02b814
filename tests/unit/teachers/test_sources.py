"""Classifiers of timm, torchvision and of one's own as teachers."""

import re
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from kd_plugins import teachers
from kd_plugins.errors import DistillError
from kd_plugins.teachers import PixelFormat, build_source, create_network, find_source, sources, teacher_kind
from kd_plugins.teachers.classifier import find_options

timm = pytest.importorskip('timm')
torchvision = pytest.importorskip('torchvision')

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STUDENT = PixelFormat((127.5,) * 3, (127.5,) * 3, rgb=True)


class Tiny(nn.Module):
    """Takes any resolution; without an attribute that tells the number of classes."""

    def __init__(self, classes=3, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3)
        self.head = nn.Linear(4, classes)

    def forward(self, images):
        return self.head(self.stem(images).relu().mean((2, 3)))


class Fixed(Tiny):
    """Takes images of 8x8 only."""

    def forward(self, images):
        return super().forward(images.reshape(len(images), 3, 8, 8))


def not_a_module():
    return 3


def maps():
    return nn.Conv2d(3, 3, 1)


LOADED = Tiny(5)


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (2, 3, 48, 48), generator=torch.Generator().manual_seed(0)).float()


def saved(net, folder, wrap=lambda state: state):
    path = folder / 'net.pth'
    torch.save(wrap(net.state_dict()), path)
    return str(path)


def logits_of(cfg, images, student=STUDENT):
    teacher, _ = build_source(find_source(cfg), student)
    return teacher, teacher.outputs(images, None, ['logits']).call('logits').output


def plain(net, pixels, mean=MEAN, std=STD):
    mean, std = (255 * torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    with torch.no_grad():
        return net.eval()((pixels - mean) / std)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ the same logits as the plain network
def test_timm_at_its_own_resolution(tmp_path, pixels):
    """A 160 teacher of a 48 student: enlarged after re-normalising, both affine, so in any order."""
    torch.manual_seed(0)
    net = timm.create_model('test_resnet', num_classes=3)
    cfg = dict(timm='test_resnet', checkpoint=saved(net, tmp_path), num_classes=3)
    teacher, found = logits_of(cfg, (pixels - 127.5) / 127.5)
    data = timm.data.resolve_data_config({}, model=net)
    size, mode = data['input_size'][-2:], data['interpolation']
    assert size == (160, 160)
    close(found, plain(net, interpolate(pixels, size, mode=mode, antialias=True), data['mean'], data['std']))
    assert teacher.head == 'logits' and teacher.kind == 'timm' and teacher.num_classes == 3
    assert 'resized to 160x160' in teacher.normalization


@pytest.mark.parametrize('size, shape', [(48, (48, 48)), ((32, 64), (32, 64)), (96, (96, 96))])
def test_timm_transformer_at_another_resolution(tmp_path, pixels, size, shape):
    torch.manual_seed(0)
    net = create_network('test_vit', num_classes=3, input_size=size)
    cfg = dict(timm='test_vit', checkpoint=saved(net, tmp_path), num_classes=3, input_size=size)
    _, found = logits_of(cfg, (pixels - 127.5) / 127.5)
    mode = net.pretrained_cfg['interpolation']
    resized = pixels if shape == (48, 48) else interpolate(pixels, shape, mode=mode, antialias=True)
    close(found, plain(net, resized, net.pretrained_cfg['mean'], net.pretrained_cfg['std']))


def test_own_mean_and_std_and_inner_layers(tmp_path, pixels):
    net = timm.create_model('test_resnet', num_classes=3)
    cfg = dict(timm='test_resnet', checkpoint=saved(net, tmp_path), num_classes=3, input_size=48)
    cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    teacher, found = logits_of(cfg, (pixels - 127.5) / 127.5)
    close(found, plain(net, pixels, cfg['mean'], cfg['std']))
    assert teacher.outputs(pixels, None, ['net.layer4']).call('net.layer4').output.dim() == 4
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training


def test_mmengine_checkpoint_and_its_class_names(tmp_path, pixels):
    net = timm.create_model('test_resnet', num_classes=3)
    names = ['cat', 'dog', 'eel']
    path = saved(net, tmp_path, lambda s: dict(state_dict=s, meta=dict(dataset_meta=dict(classes=names))))
    cfg = dict(timm='test_resnet', checkpoint=path, num_classes=3)
    assert logits_of(cfg, pixels)[0].classes == ('cat', 'dog', 'eel')
    given = dict(cfg, classes=('a', 'b', 'c'))
    assert logits_of(given, pixels)[0].classes == ('a', 'b', 'c')
    del given['num_classes']  # the names tell
    assert logits_of(given, pixels)[0].num_classes == 3


def test_multi_label_and_options(tmp_path, pixels):
    net = timm.create_model('test_resnet', num_classes=3)
    cfg = dict(timm='test_resnet', checkpoint=saved(net, tmp_path), num_classes=3, options=dict(drop_rate=0.5))
    teacher, _ = logits_of(dict(cfg, multi_label=True), pixels)
    assert teacher.model.logits.activation == 'sigmoid' and teacher.model.net.drop_rate == 0.5


def test_grey_images(tmp_path):
    """A student on grey images: a grey teacher gets them, one of three channels their copies."""
    grey = torch.randint(0, 256, (2, 1, 48, 48), generator=torch.Generator().manual_seed(0)).float()
    student = PixelFormat((100.0,), (50.0,), rgb=True)
    for channels in (1, 3):
        net = timm.create_model('test_resnet', num_classes=3, in_chans=channels)
        cfg = dict(timm='test_resnet', checkpoint=saved(net, tmp_path), num_classes=3, input_size=48)
        cfg.update(in_chans=channels, mean=(0.3,) * channels, std=(0.2,) * channels)
        teacher, found = logits_of(cfg, (grey - 100) / 50, student)
        assert teacher.channels == channels
        close(found, plain(net, grey.repeat(1, channels, 1, 1), cfg['mean'], cfg['std']))
        if channels == 1:
            with pytest.raises(DistillError, match='student sees images of 3 channels and the teacher takes 1'):
                build_source(find_source(cfg), PixelFormat((1.0, 2.0, 3.0)))


def test_torchvision_at_the_students_resolution(tmp_path, pixels):
    torch.manual_seed(0)
    net = torchvision.models.squeezenet1_1(num_classes=3)
    cfg = dict(torchvision='squeezenet1_1', checkpoint=saved(net, tmp_path), num_classes=3)
    teacher, found = logits_of(cfg, (pixels - 127.5) / 127.5)
    close(found, plain(net, pixels))
    assert 'resized' not in teacher.normalization
    _, found = logits_of(dict(cfg, input_size=64), (pixels - 127.5) / 127.5)
    close(found, plain(net, interpolate(pixels, (64, 64), mode='bicubic', antialias=True)))


def test_torchvision_transformer_is_built_for_its_resolution(tmp_path, pixels, monkeypatch):
    small = dict(num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16)

    def get_model(name, weights, image_size, num_classes):
        net = torchvision.models.VisionTransformer(image_size, 16, num_classes=num_classes, **small)
        nn.init.normal_(net.heads.head.weight)  # zero at first
        return net

    # All that torchvision has are large.
    monkeypatch.setattr(torchvision.models, 'get_model', get_model)
    images = (pixels - 127.5) / 127.5
    for options, size in (({}, 224), (dict(input_size=64), 64)):
        torch.manual_seed(0)
        net = get_model('vit_b_16', None, size, 3)
        cfg = dict(torchvision='vit_b_16', checkpoint=saved(net, tmp_path), num_classes=3, **options)
        _, found = logits_of(cfg, images)
        close(found, plain(net, interpolate(pixels, (size, size), mode='bicubic', antialias=True)))
    with pytest.raises(DistillError, match='must be a square'):
        build_source(find_source(dict(cfg, input_size=(64, 32))), STUDENT)


def test_module_by_name_and_by_itself(tmp_path, pixels, monkeypatch):
    torch.manual_seed(0)
    net = Tiny(5)
    path = saved(net, tmp_path)
    for module in (f'{__name__}:Tiny', Tiny, lambda classes: Tiny(classes)):
        cfg = dict(module=module, options=dict(classes=5), checkpoint=path)
        teacher, found = logits_of(cfg, (pixels - 127.5) / 127.5)
        close(found, plain(net, pixels))
        assert teacher.num_classes == 5 and teacher.kind == 'module'
    for module in (LOADED, f'{__name__}:LOADED'):
        teacher, found = logits_of(dict(module=module, classes=list('abcde')), (pixels - 127.5) / 127.5)
        close(found, plain(LOADED, pixels))
        # It is a copy that is frozen.
        assert all(p.requires_grad for p in LOADED.parameters()) and teacher.classes == tuple('abcde')


def test_module_for_one_resolution(tmp_path, pixels):
    net = Fixed()
    cfg = dict(module=Fixed, checkpoint=saved(net, tmp_path))
    with pytest.raises(DistillError, match=r'cannot be run on two images of 224x224 .*give teacher\.input_size='):
        build_source(find_source(cfg), STUDENT)
    _, found = logits_of(dict(cfg, input_size=8), (pixels - 127.5) / 127.5)
    close(found, plain(net, interpolate(pixels, (8, 8), mode='bicubic', antialias=True)))


def test_random_generators_are_left_alone(tmp_path):
    cfg = dict(timm='test_resnet', checkpoint=saved(timm.create_model('test_resnet'), tmp_path))
    module = dict(module=Tiny, checkpoint=saved(Tiny(), tmp_path / '..'))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for given in (cfg, module):
        build_source(find_source(given), STUDENT)
    assert torch.equal(torch.rand(1), expected)


# ------------------------------------------------------------------ which weights
def test_which_weights_were_taken_is_said(tmp_path, pixels):
    nets = [create_network('test_resnet', num_classes=3) for _ in range(2)]
    raw, average = (net.state_dict() for net in nets)
    path = str(tmp_path / 'x.pth.tar')
    torch.save(dict(state_dict=raw, state_dict_ema={f'module.{k}': v for k, v in average.items()}), path)
    for options, state, note in (
        ({}, average, "weights are 'state_dict_ema' of the file, not 'state_dict'"),
        (dict(checkpoint_prefix='state_dict.'), raw, None),
    ):
        teacher, notes = build_source(find_source(dict(timm='test_resnet', checkpoint=path, **options)), STUDENT)
        assert all(torch.equal(v, state[k]) for k, v in teacher.model.net.state_dict().items())
        assert teacher.num_classes == 3  # read behind `module.`
        assert notes[:1] == [n for n in [note] if n]


def facebook(state):
    """ConvNeXt as its authors name it, which timm converts."""
    changed = {}
    for key, value in state.items():
        key = key.replace('stem.', 'downsample_layers.0.').replace('.blocks.', '.').replace('conv_dw', 'dwconv')
        key = re.sub(r'stages\.(\d)\.downsample\.', r'downsample_layers.\1.', key).replace('mlp.fc', 'pwconv')
        changed[key.replace('head.norm', 'norm').replace('head.fc', 'head')] = value
    return changed


def test_names_of_other_code_are_converted_by_timm(tmp_path):
    net = create_network('test_convnext', num_classes=3)
    wrap = lambda s: dict(model={f'module.{k}': v for k, v in facebook(s).items()})  # noqa: E731
    cfg = dict(timm='test_convnext', checkpoint=saved(net, tmp_path, wrap))
    teacher, notes = build_source(find_source(cfg), STUDENT)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in teacher.model.net.state_dict().items())
    assert teacher.num_classes == 3 and notes == ['names of other code, converted as timm or torchvision convert them']
    cfg['timm'] = 'test_resnet'
    with pytest.raises(DistillError, match='does not fit ResNet'):
        build_source(find_source(cfg), STUDENT)


def test_old_names_of_torchvision(tmp_path):
    """DenseNet's published files have a dot in what are module names today; its own reader takes it out."""
    net = torchvision.models.DenseNet(4, (1, 1), 8, num_classes=3)
    state = {k: v for k, v in net.state_dict().items() if not k.endswith('num_batches_tracked')}
    old = {re.sub(r'(denselayer1\.\w+)([12])\.', r'\1.\2.', k): v for k, v in state.items()}
    assert any('norm.1' in k for k in old)
    torch.save(old, tmp_path / 'net.pth')
    made = []

    def get_model(name, weights, num_classes=5):
        made.append(torchvision.models.DenseNet(4, (1, 1), 8, num_classes=num_classes))
        return made[-1]

    cfg = dict(torchvision='densenet121', checkpoint=str(tmp_path / 'net.pth'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, 'get_model', get_model)
        teacher, _ = build_source(find_source(cfg), STUDENT)
    assert all(torch.equal(v, teacher.model.net.state_dict()[k]) for k, v in state.items())


def test_a_folder_as_timm_writes_it(tmp_path, monkeypatch):
    """``local-dir:`` is a model with its own weights, and one to load others into."""
    net = create_network('test_resnet', num_classes=3, drop_rate=0.5)
    timm.models.save_for_hf(net, tmp_path / 'own')
    monkeypatch.chdir(tmp_path)
    found = find_source(dict(timm='local-dir:own', pretrained=True))
    assert found['timm'] == f'local-dir:{tmp_path / "own"}'  # processes on several GPUs start in another folder
    teacher, _ = build_source(found, STUDENT)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in teacher.model.net.state_dict().items())
    other = create_network('test_resnet', num_classes=3)
    cfg = dict(timm='local-dir:own', checkpoint=saved(other, tmp_path))
    teacher, _ = build_source(find_source(cfg), STUDENT)
    assert torch.equal(teacher.model.net.fc.weight, other.fc.weight)
    with pytest.raises(DistillError, match=r"'local-dir:.*' has no option 'drop': "):
        build_source(find_source(dict(cfg, options=dict(drop=1))), STUDENT)


@pytest.mark.parametrize('name', ['hf-hub:timm/test_resnet.r160_in1k', 'hf_hub:timm/test_resnet.r160_in1k'])
def test_a_model_of_the_hub(tmp_path, monkeypatch, name):
    net = create_network('test_resnet')
    timm.models.save_for_hf(net, tmp_path / 'hub', safe_serialization=True)
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename))
        return str(tmp_path / 'hub' / filename)

    monkeypatch.setattr('timm.models._hub.hf_hub_download', download)
    teacher, _ = build_source(find_source(dict(timm=name, pretrained=True)), STUDENT)
    assert torch.equal(teacher.model.net.fc.weight, net.fc.weight)
    assert {repo for repo, _ in asked} == {'timm/test_resnet.r160_in1k'}

    def fail(*given, **options):
        raise OSError('We cannot reach the hub.\nTry later.')

    monkeypatch.setattr('timm.models._hub.hf_hub_download', fail)
    with pytest.raises(DistillError, match=r'cannot be had \(OSError: We cannot reach the hub\); give a file\.$'):
        build_source(find_source(dict(timm=name, pretrained=True)), STUDENT)


# ------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    'options, message',
    [
        (dict(timm='test_resnte'), "teacher.timm: timm has no model 'test_resnte'; did you mean 'test_resnet'"),
        (dict(timm='timm/resnet18.a1_in1k'), "cannot read the name 'timm/resnet18.a1_in1k'.* 'hf-hub:owner/name'"),
        (dict(timm='timm://resnet18'), "cannot read the name .*'local-dir:folder'"),
        (dict(timm='local-dir:nowhere'), "there is no 'nowhere/config.json', which 'local-dir:nowhere' needs"),
        (dict(timm=LOADED), 'must be the name of a model of timm, .* got an object of type Tiny'),
        (dict(torchvision=LOADED), 'must be the name of a model of torchvision, .* got an object of type Tiny'),
        (LOADED, r'teacher must be one of dict\(config=.*; got an object of type Tiny'),
        (dict(timm='test_resnet', checkpoint=LOADED.state_dict()), r'got .*torch\.save\(model\.state_dict\(\), path\)'),
        (dict(timm='test_resnet', checkpoint_prefix=3), 'teacher.checkpoint_prefix must be what names .* got 3'),
        (dict(torchvision='resnet81'), "torchvision has no classifier 'resnet81'; did you mean 'resnet18'"),
        (dict(torchvision='fasterrcnn_resnet50_fpn'), 'torchvision has no classifier'),
        (dict(torchvision='resnet18', in_chans=1), 'in_chans is 1, but torchvision has models for 3 channels only'),
        (dict(torchvision='resnet18', options=3), 'options must be a dict of options'),
        (dict(torchvision='resnet18', checkpoint=None), "needs 'checkpoint'"),
        (dict(timm='test_resnet', options=3), 'options must be a dict of options'),
        (dict(timm='test_resnet', chekpoint='x'), "no option 'chekpoint': did you mean 'checkpoint'"),
        (dict(timm='test_resnet', checkpoint='none.pth'), "teacher.checkpoint 'none.pth' does not exist"),
        (dict(timm='test_resnet', checkpoint=3), 'teacher.checkpoint must be the path of a file, got 3'),
        (dict(timm='test_resnet', checkpoint=None), r"needs 'checkpoint'.*pretrained=True"),
        (dict(timm='test_resnet', pretrained=True), 'not both'),
        (dict(timm='test_resnet', pretrained=3), 'pretrained must be True or False, got 3'),
        (dict(module=3), r"teacher.module must be 'package.module:factory', .* got 3"),
        (dict(module='os'), "must be written 'package.module:factory', got 'os'"),
        (dict(module='no_such_package.x:f'), "'no_such_package.x' cannot be imported .*PYTHONPATH"),
        (dict(module='os.path:joni'), "'os.path' has no 'joni'; did you mean 'join'"),
        (dict(module='os:sep'), "got 'os:sep', which is of type str"),
        (dict(module=Tiny, checkpoint=None), 'Tiny makes a new network'),
        (dict(module=Tiny, options=[]), None),
        (dict(module=Tiny, options=[1]), 'options must be a dict of arguments of Tiny'),
        (dict(module=Tiny(), options=dict(a=1)), r'is a network already \(Tiny\): remove teacher.options'),
    ],
)
def test_refused_by_name_or_option(tmp_path, options, message):
    cfg = dict(dict(checkpoint=saved(Tiny(), tmp_path)), **options) if isinstance(options, dict) else options
    if message is None:
        find_source(cfg)
        return
    with pytest.raises(DistillError, match=message) as error:
        find_source(cfg)
    assert len(str(error.value)) < 400 and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(num_classes=True), 'teacher.num_classes must be a whole number >= 1, got True'),
        (dict(in_chans=0), 'teacher.in_chans must be a whole number >= 1, got 0'),
        (dict(input_size=0), 'teacher.input_size must be a whole number >= 1'),
        (dict(input_size='64'), "teacher.input_size must be a whole number >= 1 .*got '64'"),
        (dict(input_size=(1, 2, 3)), r'or \(height, width\), got \(1, 2, 3\)'),
        (dict(mean=0.5), 'teacher.mean must be three numbers, of pixels in .* got 0.5'),
        (dict(mean=(0.5, 'x', 0.5)), 'teacher.mean must be three numbers'),
        (dict(std=(0.5, 0, 0.5)), 'teacher.std must be three numbers'),
        (dict(std=(0.5,) * 3, in_chans=1), r'teacher.std must be 1 number\(s\)'),
        (dict(classes='abc'), "teacher.classes must be a list of names, got 'abc'"),
        (dict(classes=[1, 2]), r'teacher.classes must be a list of names, got \[1, 2\]'),
        (dict(classes=['a', 'b'], num_classes=3), 'has 2 names but the teacher predicts 3 classes'),
        (dict(multi_label=1), 'teacher.multi_label must be True or False, got 1'),
    ],
)
def test_refused_values(options, message):
    with pytest.raises(DistillError, match=message):
        find_options(options, ())


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(timm='test_resnet', num_classes=4), r'fc\.weight is .*teacher\.timm is the one it was trained with'),
        (dict(timm='test_vit', num_classes=3), 'belongs to another architecture: check teacher.timm'),
        (dict(timm='test_resnet', num_classes=3, options=dict(drop=1)), "no option 'drop': did you mean 'drop_"),
        (dict(torchvision='squeezenet1_1'), 'check teacher.torchvision'),
        (dict(torchvision='squeezenet1_1', options=dict(x=1)), 'cannot be created with x=1'),
        (dict(module=Tiny), 'check teacher.module'),
        (dict(module=Tiny, options=dict(x=1)), 'Tiny failed .*unexpected keyword'),
        (dict(module=not_a_module), 'not_a_module must return an nn.Module, but returned 3'),
    ],
)
def test_refused_while_loading(tmp_path, options, message):
    path = saved(timm.create_model('test_resnet', num_classes=3), tmp_path)
    with pytest.raises(DistillError, match=message):
        build_source(find_source(dict(options, checkpoint=path)), STUDENT)


def test_names_and_outputs_of_a_module(tmp_path):
    with pytest.raises(DistillError, match='predicts 5 classes, but 2 were expected'):
        logits_of(dict(module=LOADED, classes=['a', 'b']), torch.rand(1, 3, 32, 32))
    with pytest.raises(DistillError, match=r'teacher.module: Conv2d must return class logits .*\(2, 3, 224, 224\)'):
        build_source(find_source(dict(module=maps, checkpoint=saved(maps(), tmp_path))), STUDENT)
    with pytest.raises(DistillError, match=r'1 channel\(s\).*teacher\.in_chans'):
        build_source(find_source(dict(module=LOADED, in_chans=1)), STUDENT)


def test_pretrained_weights_with_a_new_head_are_noise(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained, **options: create(name, **options))
    with pytest.raises(DistillError, match='know 1000 classes, and a new head would teach noise'):
        build_source(find_source(dict(timm='test_resnet', pretrained=True, num_classes=3)), STUDENT)


def test_a_package_that_is_not_installed(monkeypatch):
    for package, cfg in (('timm', dict(timm='x')), ('torchvision', dict(torchvision='x'))):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            DistillError, match=rf"needs '{package}', which is not installed; (pip install 'timm|in a clone of )"
        ):
            find_source(cfg)


# ------------------------------------------------------------------ another kind
KIND = """
from kd_plugins.teachers import FrozenTeacher, register_teacher

register_teacher('lookup', __name__, "dict(lookup='a table')")


def find(cfg):
    return {**cfg, 'found': True}


def build(cfg, student):
    from torch import nn

    return FrozenTeacher(nn.Identity(), None, None, name=cfg['lookup']), [str(cfg['found'])]
"""


def test_another_kind_is_one_file(tmp_path, monkeypatch):
    assert teacher_kind(dict(timm='resnet50')) == 'timm'  # those of the package are registered for good
    (tmp_path / 'lookup.py').write_text(KIND)
    name = f'{teachers.__name__}.lookup'
    monkeypatch.setattr(teachers, '__path__', [*teachers.__path__, str(tmp_path)])
    monkeypatch.setattr(teachers, 'lookup', None, raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    del sys.modules[name]
    monkeypatch.setattr(sources, '_SOURCES', dict(sources._SOURCES))
    sources._register_own.cache_clear()
    teacher, notes = build_source(find_source(dict(lookup='a table')), STUDENT)
    assert teacher.name == 'a table' and notes == ['True']
    with pytest.raises(DistillError, match=r"must be one of dict\(config=.*dict\(lookup='a table'\)") as caught:
        find_source(dict(model='x', checkpoint='x.pth'))
    assert len(str(caught.value)) < 400
