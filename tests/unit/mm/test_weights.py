"""Which weights a teacher of the MM family gets: mmdet's old names, MMEngine's addresses, its classifiers."""

import copy
import json

import mmengine.runner.checkpoint as mm
import pytest
import torch
from mmengine.config import Config

from kd_plugins.errors import DistillError
from kd_plugins.mm import schemes
from kd_plugins.mm.source import find
from kd_plugins.mm.teacher import build_architecture, load_model
from kd_plugins.teachers import find_file, load_checkpoint

pytest.importorskip('mmdet')

PREPROCESSOR = dict(type='DetDataPreprocessor', mean=[0.0] * 3, std=[1.0] * 3)
FCOS = dict(
    type='FCOS',
    data_preprocessor=PREPROCESSOR,
    backbone=dict(type='ResNet', depth=18, base_channels=4, stem_channels=4),
    neck=dict(type='FPN', in_channels=[4, 8, 16, 32], out_channels=8, start_level=1, num_outs=3),
    bbox_head=dict(type='FCOSHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1),
)
FCOS['bbox_head'].update(strides=[8, 16, 32], norm_cfg=dict(type='GN', num_groups=2))
RETINA_HEAD = dict(type='RetinaHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1)
CLASSIFIER = dict(type='kd_plugins.TimmClassifier', model='test_convnext', num_classes=3)


def config(model, scope='mmdet'):
    return Config(dict(model=copy.deepcopy(model), default_scope=scope))


def loaded(cfg, state, tmp_path, **options):
    """A built teacher with the weights, and what is noted."""
    torch.save(dict(state_dict=state), tmp_path / 'x.pth')
    cfg = dict(config=cfg, checkpoint=str(tmp_path / 'x.pth'), **options)
    model, _ = build_architecture(cfg)
    return model, load_model(model, cfg)[1]


def random(cfg):
    model, _ = build_architecture(dict(config=cfg))
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_names_of_an_older_mmdet(tmp_path):
    """What `load_from` converts is converted: `fcos_cls` became `conv_cls`, and the head of an RPN `bbox_head`."""
    for model, renames in (
        (FCOS, (('conv_cls', 'fcos_cls'), ('conv_reg', 'fcos_reg'), ('conv_centerness', 'fcos_centerness'))),
        (dict(FCOS, type='RetinaNet', bbox_head=RETINA_HEAD), (('bbox_head', 'rpn_head'),)),
    ):
        cfg = config(model)
        source = random(cfg)
        state = source.state_dict()
        for new, old in renames:
            state = {k.replace(new, old): v for k, v in state.items()}
        theirs = random(cfg)
        mm.load_state_dict(theirs, state.copy(), strict=True)
        ours, notes = loaded(cfg, state, tmp_path)
        assert equal(theirs, source) and equal(ours, source) and 'old names of the file converted' in notes[0]


def test_todays_names(tmp_path):
    source = random(config(FCOS))
    for state in (source.state_dict(), dict(source.state_dict())):  # with and without versions of the modules
        model, notes = loaded(config(FCOS), state, tmp_path)
        assert equal(model, source) and notes == []


def test_a_mean_teacher_is_asked_which(tmp_path):
    """What `SemiBaseDetector` saves, of which a plain detector is one half."""
    student, teacher = random(config(FCOS)), random(config(FCOS))
    state = {f'{n}.{k}': v for n, m in (('student', student), ('teacher', teacher)) for k, v in m.state_dict().items()}
    with pytest.raises(
        DistillError, match=r"fit FCOS.*'student\.', 'teacher\.'.*teacher\.checkpoint_prefix='teacher\.'"
    ):
        loaded(config(FCOS), state, tmp_path)
    assert equal(loaded(config(FCOS), state, tmp_path, checkpoint_prefix='teacher.')[0], teacher)
    assert equal(loaded(config(FCOS), state, tmp_path, checkpoint_prefix='student.')[0], student)
    with pytest.raises(DistillError, match=r"no name in .* begins with it; did you mean 'teacher\.'"):
        loaded(config(FCOS), state, tmp_path, checkpoint_prefix='teachr.')
    with pytest.raises(DistillError, match=r'must be what names in the file begin with.*got 3'):
        loaded(config(FCOS), state, tmp_path, checkpoint_prefix=3)


def test_a_classifier_by_the_names_of_its_network(tmp_path):
    """Its checkpoints are timm's, so old names are timm's too, and allowances are written in them."""
    source = random(config(CLASSIFIER, 'mmengine'))
    state = {f'module.{k}': v for k, v in source.state_dict().items()}
    model, _ = loaded(config(CLASSIFIER, 'mmengine'), state, tmp_path)
    assert equal(model, source)
    del state['module.head.fc.bias']
    with pytest.raises(DistillError, match=r'1 of \d+ keys missing \(head\.fc\.bias\)'):
        loaded(config(CLASSIFIER, 'mmengine'), state, tmp_path)
    loaded(config(CLASSIFIER, 'mmengine'), state, tmp_path, allow_missing=['head.fc'])


def test_a_student_starts_from_part_of_a_file(tmp_path):
    source = random(config(CLASSIFIER, 'mmengine'))
    parts = dict(a=source.state_dict(), b={k: v + 1 for k, v in source.state_dict().items()})
    torch.save(
        dict(state_dict={f'{n}.{k}': v for n, part in parts.items() for k, v in part.items()}), tmp_path / 'x.pth'
    )
    start = dict(CLASSIFIER, checkpoint=str(tmp_path / 'x.pth'))
    with pytest.raises(DistillError, match=r"^model\.checkpoint .*model\.checkpoint_prefix='b\.'"):
        build_architecture(dict(config=config(start, 'mmengine')))[0].init_weights()
    student, _ = build_architecture(dict(config=config(dict(start, checkpoint_prefix='a.'), 'mmengine')))
    student.init_weights()
    assert equal(student, source)


# ------------------------------------------------------------------ addresses of MMEngine
def test_addresses_mean_what_they_mean_in_mmengine(monkeypatch):
    asked = []
    monkeypatch.setattr(mm, 'load_from_http', lambda url, **options: asked.append(url) or {})
    for address in (
        'torchvision://resnet50',
        'torchvision://resnet50.imagenet1k_v2',
        'modelzoo://resnet50',
        'open-mmlab://detectron2/resnet50_caffe',
        'openmmlab://detectron2/resnet50_caffe',
        'open-mmlab://detectron/resnet50_caffe',
        'open-mmlab://resnet50_caffe_bgr',  # a name of old
        'mmcls://resnet50',
    ):
        if address == 'open-mmlab://resnet50_caffe_bgr':
            address = f'open-mmlab://{next(iter(mm.get_deprecated_model_names()))}'
        mm.CheckpointLoader.load_checkpoint(address, logger='silent')
        assert find_file(address) == asked[-1]
        assert find(dict(config=config(FCOS), checkpoint=address))['checkpoint'] == asked[-1]


def test_a_list_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / 'open_mmlab.json').write_text(json.dumps(dict(mine='mine.pth', gone='gone.pth')))
    torch.save(dict(state_dict=dict(a=torch.ones(1))), tmp_path / 'mine.pth')
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    assert find_file('open-mmlab://mine') == str(tmp_path / 'mine.pth')
    assert set(load_checkpoint('open-mmlab://mine')['state_dict']) == {'a'}
    with pytest.raises(DistillError, match=r"'open-mmlab://gone' means '.*gone\.pth', which does not exist"):
        find_file('open-mmlab://gone')


@pytest.mark.parametrize(
    'address, message',
    [
        ('torchvision://resnet5', r"MMEngine knows no such weights; did you mean 'resnet50'"),
        ('open-mmlab://nothing', r'MMEngine knows no such weights'),
        ('s3://bucket/x.pth', r"'s3://bucket/x\.pth' cannot be read; download the file and give its path"),
        ('petrel://bucket/x.pth', r'cannot be read; download'),
    ],
)
def test_addresses_that_lead_nowhere(address, message):
    with pytest.raises(DistillError, match=f'^teacher.checkpoint .*{message}') as error:
        find_file(address)
    assert len(str(error.value)) < 400


def test_every_list_of_mmengine_is_known():
    lists = {f.__name__ for f in schemes._LISTS.values()}
    named = {p for p, loader in mm.CheckpointLoader._schemes.items() if lists & set(loader.__code__.co_names)}
    assert {f'{s}://' for s in schemes._LISTS} == named


def test_a_network_as_a_teacher():
    for given in (torch.nn.Sequential(*[torch.nn.Linear(1, 1) for _ in range(99)]), 'x.pth'):
        with pytest.raises(DistillError, match=r'teacher must be dict\(config=.*, checkpoint=.*\), got') as error:
            build_architecture(given)
        assert len(str(error.value)) < 400
