"""A checkpoint tells its network: timm's arguments, a config beside it, shapes; or what to write is said."""

import argparse

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.teachers import PixelFormat, build_source, find_source, recognition
from kd_plugins.teachers.recognition import by_shapes, recognise

timm = pytest.importorskip('timm')
STUDENT = PixelFormat((127.5,) * 3, (127.5,) * 3, rgb=True)
NAMES = ['resnet18', 'resnet34', 'resnetblur18', 'test_resnet', 'test_efficientnet', 'test_vit']


@pytest.fixture(autouse=True)
def few_models(monkeypatch):
    """All of timm takes some seconds."""
    monkeypatch.setattr(timm, 'list_models', lambda: NAMES)


def weights(name='test_resnet', **options):
    return timm.create_model(name, **{'num_classes': 5, **options}).state_dict()


def saved(tmp_path, content, name='best.pth.tar'):
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


def by_timm(**args):
    """What timm's train.py saves."""
    usual = dict(model='test_resnet', num_classes=5, img_size=None, input_size=None, in_chans=None, mean=None, std=None)
    args = argparse.Namespace(**{**usual, 'model_kwargs': {}, 'gp': None, **args})
    return dict(epoch=3, arch=args.model, args=args, version=2)


def test_arguments_of_timm(tmp_path):
    path = saved(tmp_path, {**by_timm(img_size=64, mean=[0.5]), 'state_dict': weights()})
    found = find_source(dict(checkpoint=path))
    assert found == dict(timm='test_resnet', num_classes=5, input_size=64, mean=(0.5,) * 3, checkpoint=path)
    teacher, _ = build_source(found, STUDENT)
    assert teacher.num_classes == 5 and teacher.outputs(torch.zeros(1, 3, 32, 32), None, ['net.conv1'])
    # What is written comes first.
    written = find_source(dict(checkpoint=path, input_size=32, classes=list('abcde')))
    assert (written['input_size'], written['classes']) == (32, list('abcde'))


def test_grey_images_and_the_models_own_options(tmp_path):
    options = by_timm(model='test_vit', input_size=[1, 64, 64], model_kwargs={'class_token': False}, gp='avg')
    state = weights('test_vit', in_chans=1, img_size=64, class_token=False, global_pool='avg')
    found = recognise(dict(checkpoint=saved(tmp_path, {**options, 'state_dict': state})))
    assert (found['in_chans'], found['input_size']) == (1, 64)
    assert found['options'] == {'class_token': False, 'global_pool': 'avg'}
    build_source(found, STUDENT)


def test_a_name_alone(tmp_path):
    """As torch's own example of ImageNet saves it."""
    found = recognise(dict(checkpoint=saved(tmp_path, dict(arch='test_resnet', state_dict=weights()))))
    assert found['timm'] == 'test_resnet' and 'input_size' not in found


def test_shapes(tmp_path):
    # EfficientNet tries parts that it does not use.
    for name in ('test_resnet', 'test_efficientnet', 'test_vit', 'resnet34'):
        assert by_shapes(weights(name)) == [name]
    # timm saves the class where it has no arguments.
    found = recognise(dict(checkpoint=saved(tmp_path, dict(arch='resnet', state_dict=weights()))))
    assert found['timm'] == 'test_resnet'
    before = torch.get_rng_state()
    by_shapes({})
    assert torch.equal(before, torch.get_rng_state())


def test_equal_networks_are_told_by_the_name_of_the_file(tmp_path):
    state = weights('resnet18')
    assert recognise(dict(checkpoint=saved(tmp_path, state, 'resnet18-f37072fd.pth')))['timm'] == 'resnet18'
    assert recognise(dict(checkpoint=saved(tmp_path, state, 'resnetblur18-x.pth')))['timm'] == 'resnetblur18'
    path = saved(tmp_path, state, 'best.pth')
    with pytest.raises(DistillError, match='fit resnet18, resnetblur18 of timm; write teacher=') as error:
        find_source(dict(checkpoint=path))
    assert '--teacher timm::NAME' in str(error.value) and len(str(error.value)) - len(path) < 400


def test_what_is_no_model_of_timm(tmp_path):
    path = saved(tmp_path, {'net.weight': torch.zeros(3, 3)})
    with pytest.raises(DistillError, match='no model of timm at its default resolution'):
        find_source(dict(checkpoint=path))
    with pytest.raises(DistillError, match='does not exist'):
        find_source(dict(checkpoint=str(tmp_path / 'none.pth')))


def test_the_config_beside_a_checkpoint_of_mmengine(tmp_path, monkeypatch):
    monkeypatch.setattr(recognition, 'by_shapes', lambda state: [])
    content = dict(meta=dict(experiment_name='my_big_20260101_120000'), state_dict={'x.y': torch.zeros(2)})
    path = saved(tmp_path, content, 'epoch_3.pth')
    with pytest.raises(DistillError, match='for a model of MMEngine'):
        recognise(dict(checkpoint=path))
    (tmp_path / 'my_big.py').write_text('model = dict()\n')
    assert recognise(dict(checkpoint=path)) == dict(config=str(tmp_path / 'my_big.py'), checkpoint=path)


def test_other_objects_in_the_arguments_stay_inert(tmp_path):
    """A file may hold anything; only a bag of attributes is made of it."""
    args = argparse.Namespace(model='test_resnet', num_classes=5, hook=print, path=tmp_path)
    found = recognise(dict(checkpoint=saved(tmp_path, dict(args=args, state_dict=weights()))))
    assert (found['timm'], found['num_classes']) == ('test_resnet', 5)


def test_a_bare_file_in_ultralytics(tmp_path):
    """The callback takes a checkpoint that tells its network as MMEngine's command does; it stays a bare path."""
    pytest.importorskip('ultralytics')
    from kd_plugins.yolo import DistillCallback

    path = saved(tmp_path, {**by_timm(), 'state_dict': weights()})
    options = DistillCallback(path, cls=1).options
    assert options.teacher == path and options.sources()[''] == dict(checkpoint=path)
    teacher, _ = build_source(options.sources()[''], STUDENT)
    assert teacher.name == 'timm test_resnet' and teacher.num_classes == 5
    assert DistillCallback(dict(checkpoint=path), cls=1).options.teacher == dict(checkpoint=path)
    with pytest.raises(DistillError, match='does not say which network it is'):
        DistillCallback(saved(tmp_path, dict(a=torch.ones(1)), 'x.pth'), cls=1)
