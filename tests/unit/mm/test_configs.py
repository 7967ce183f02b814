"""Configs whose types are names, whole paths, or the classes and functions themselves."""

import os

import pytest
import torch
from mmdet.models import RTMDet
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.model import PretrainedInit
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import MODELS, Registry

from kd_plugins.adapters import LogitProjector
from kd_plugins.distiller import build_terms
from kd_plugins.errors import DistillError
from kd_plugins.losses import KLDivLoss
from kd_plugins.mm import DistillHook, TimmClassifier, configs, distilled
from kd_plugins.mm.cli import _check_types, _use_amp, train
from kd_plugins.mm.configs import load_config, plain_model, remove_distillation, without_pretrained
from kd_plugins.mm.teacher import build_architecture


@pytest.mark.parametrize('kind', ['kd_plugins.Distilled', 'Distilled', 'kd_plugins.mm.distilled', distilled])
@pytest.mark.parametrize('student', ['RTMDet', RTMDet])
def test_the_plain_model_of_a_distilled_one(kind, student):
    cfg = dict(type=kind, student_type=student, distill=dict(teacher=1), neck=dict(a=1))
    assert plain_model(cfg) == dict(type=student, neck=dict(a=1))
    config = Config(dict(model=cfg, default_hooks=dict(distill=dict(type=DistillHook), timer=None)))
    remove_distillation(config)
    assert config.model.type is student and config.default_hooks == dict(timer=None)


def test_models_that_are_plain():
    for kind in ('RTMDet', RTMDet, None):
        assert plain_model(dict(type=kind, student_type=1)) == dict(type=kind, student_type=1)


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.model.PretrainedInit', PretrainedInit])
def test_no_weights_are_fetched(kind):
    model = dict(backbone=dict(init_cfg=dict(type=kind, checkpoint='x')), neck=dict(init_cfg=dict(type='Kaiming')))
    assert without_pretrained(model) == dict(backbone={}, neck=dict(init_cfg=dict(type='Kaiming')))


@pytest.mark.parametrize('kind', [OptimWrapper, AmpOptimWrapper, 'OptimWrapper', 'mmengine.optim.OptimWrapper', None])
def test_amp(kind):
    config = Config(dict(optim_wrapper=dict(optimizer=dict(type=torch.optim.SGD))))
    if kind is not None:
        config.optim_wrapper.type = kind
    _use_amp(config)
    assert config.optim_wrapper.type == 'AmpOptimWrapper' and config.optim_wrapper.loss_scale == 'dynamic'


def test_amp_of_another_wrapper():
    class Own(OptimWrapper):
        pass

    with pytest.raises(DistillError, match="this config uses 'Own'"):
        _use_amp(Config(dict(optim_wrapper=dict(type=Own))))


def check(hook=None, **model):
    _check_types(Config(dict(model=model, default_hooks=dict(distill=hook), default_scope='mmengine')))


@pytest.mark.parametrize('kind', ['kd_plugins.DistillHook', 'kd_plugins.mm.DistillHook', DistillHook])
def test_hooks(kind):
    check(dict(type=kind, teacher=1))


def test_types_of_others_are_theirs():
    check(dict(type=CheckpointHook, nonsense=1), type=RTMDet, nonsense=1)
    check(type='kd_plugins.losses.KLDivLoss')


@pytest.mark.parametrize('kind', ['kd_plugins.TimmClassifier', TimmClassifier, 'kd_plugins.mm.TimmClassifier'])
def test_options_of_ours(kind):
    check(type=kind, model='resnet18')
    with pytest.raises(DistillError, match=r"model \(kd_plugins\S*TimmClassifier\) needs 'model'"):
        check(type=kind)
    # What a network takes is timm's to say; what a data set takes is ours.
    dataset = dict(type='kd_plugins.ImageFolder', rot='x')
    with pytest.raises(DistillError, match="has no option 'rot'"):
        check(type=kind, model='resnet18', more=[dataset])


@pytest.mark.parametrize('kind', ['kd_plugins.DistilHook', 'kd_plugins.mm.DistilHook'])
def test_misspelt_types(kind):
    with pytest.raises(DistillError, match=r"did you mean 'kd_plugins\.DistillHook'"):
        check(dict(type=kind))


@pytest.mark.parametrize('kind', [LogitProjector, 'LogitProjector', 'kd_plugins.adapters.LogitProjector'])
@pytest.mark.parametrize('loss', [KLDivLoss, 'kd_plugins.losses.KLDivLoss'])
def test_terms(kind, loss):
    term = dict(loss=dict(type=loss), student='a', teacher='b', adapter=dict(type=kind))
    assert build_terms(dict(t=term))['t'].projects


def test_a_config_of_ours_is_a_base(tmp_path):
    """MMEngine evaluates what stands behind `_base_` alone, so the import stands there too."""
    import kd_plugins

    path = kd_plugins.config('kd_plugins::cls/digits_resnet_student')
    assert path.startswith(os.path.dirname(kd_plugins.__file__)) and os.path.isabs(path)
    (tmp_path / 'mine.py').write_text(
        "_base_ = __import__('kd_plugins').config('kd_plugins::cls/digits_resnet_student.py')\nmodel = dict(layers=1)\n"
    )
    config = Config.fromfile(tmp_path / 'mine.py')
    assert config.model.layers == 1 and config.model.model == 'resnet18' and config.train_cfg.max_epochs
    with pytest.raises(DistillError, match=r"did you mean 'kd_plugins::yolo/early.yaml'"):
        kd_plugins.config('kd_plugins::yolo/earl.yaml')


def test_a_base_that_mmengine_cannot_follow(tmp_path, monkeypatch):
    """Under other distributions of the frameworks it asks pip for a package that is there under another name."""
    (tmp_path / 'base.py').write_text("_base_ = ['./other.py', 'mmseg::fcn/fcn.py']\n")
    (tmp_path / 'other.py').write_text('model = dict()\n')
    (tmp_path / 'own.py').write_text("_base_ = './base.py'\nmodel = dict()\n")
    (tmp_path / 'circle.py').write_text("_base_ = './circle.py'\n")
    error = ModuleNotFoundError('mmsegmentation is not installed, please install mmsegmentation manually')

    def fromfile(path):
        raise error

    monkeypatch.setattr(configs.Config, 'fromfile', fromfile)
    with pytest.raises(
        DistillError, match=r"write _base_ = __import__\('kd_plugins'\)\.config\('mmseg::fcn/fcn\.py'\)"
    ):
        configs.load_config(str(tmp_path / 'own.py'))
    for name in ('other.py', 'circle.py'):
        with pytest.raises(DistillError, match='cannot be read: ModuleNotFoundError'):
            configs.load_config(str(tmp_path / name))


def test_a_config_whose_package_is_missing_says_so(tmp_path, monkeypatch):
    """Named by its imports, or only by its scope; a scope of a registry of one's own is none."""
    path = tmp_path / 'a.py'
    path.write_text("custom_imports = dict(imports=['no_such_zoo.models'])\nmodel = dict(type='ImageClassifier')\n")
    with pytest.raises(DistillError, match=r'needs no_such_zoo, which is not installed\.$'):
        load_config(str(path))
    path.write_text("default_scope = 'no_such_zoo'\nmodel = dict(type='ImageClassifier')\nwork_dir = 'x'\n")
    with pytest.raises(DistillError, match=r'^the teacher of .*a.py needs no_such_zoo, which is not installed\.$'):
        build_architecture(dict(config=str(path)))
    with pytest.raises(DistillError, match=r'^the config needs no_such_zoo, which is not installed\.$'):
        train([str(path), '--work-dir', str(tmp_path)])
    monkeypatch.setattr('kd_plugins.extras.metadata.requires', lambda _: ["zoo-of-ours<2; extra == 'no_such_zoo'"])
    with pytest.raises(DistillError, match=r"; pip install 'zoo-of-ours<2'\.$"):
        build_architecture(dict(config=str(path)))
    monkeypatch.setitem(MODELS.children, 'no_such_zoo', Registry('model', scope='no_such_zoo'))
    with pytest.raises(DistillError, match='cannot be built: KeyError'):
        build_architecture(dict(config=str(path)))
