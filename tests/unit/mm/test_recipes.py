"""Recipes on MMEngine's side: Python files, the task of a config's model, and what taps are called there."""

import pytest

pytest.importorskip('mmengine')

from mmengine.config import Config

from kd_plugins.errors import DistillError
from kd_plugins.mm.recipes import read_recipe, task_of, with_modules
from kd_plugins.recipes import load_recipe

OWN = "terms = dict(a=dict(loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck', weight=1e-3))\n"


def test_a_python_recipe(tmp_path):
    (tmp_path / 'base.py').write_text(f'alpha = 0.5\nstop = 2\n{OWN}')
    (tmp_path / 'own.py').write_text(
        "_base_ = './base.py'\ncustom_imports = dict(imports=['kd_plugins.losses'])\nterms = dict(a=dict(weight=2.0))\n"
    )
    found = read_recipe(str(tmp_path / 'own.py'), 'detection')
    assert found['alpha'] == 0.5 and found['stop'] == 2 and found['terms']['a']['weight'] == 2.0
    assert set(found) == {'alpha', 'stop', 'terms'} and found['terms']['a']['loss'] == dict(type='FeatureMSELoss')


def test_names_and_yaml_are_read_as_everywhere():
    assert read_recipe('cwd', 'segmentation') == load_recipe('cwd', 'segmentation')
    with pytest.raises(DistillError, match=r"--kd: there is no recipe 'cwdd'; did you mean 'cwd'"):
        read_recipe('cwdd', 'segmentation', '--kd')


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (f'{OWN}optimizer = dict()\n', "own.py' has no option 'optimizer'"),
        ('terms = dict(\n', r"own\.py' cannot be read: .*Error"),
        (f'detection = dict({OWN.replace(" = ", "=", 1).strip()})\n', 'is for detection, not for classification'),
    ],
)
def test_wrong_python_recipes(tmp_path, text, words):
    (tmp_path / 'own.py').write_text(text)
    with pytest.raises(DistillError, match=words) as caught:
        read_recipe(str(tmp_path / 'own.py'), 'classification')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('scope', 'kind', 'task'),
    [
        ('mmdet', 'YOLOX', 'detection'),
        ('mmdet', 'FasterRCNN', 'detection'),
        ('mmdet', 'kd_plugins.TimmClassifier', 'classification'),
        ('mmengine', 'kd_plugins.TimmClassifier', 'classification'),
        ('mmseg', 'EncoderDecoder', 'segmentation'),
        ('mmseg', 'CascadeEncoderDecoder', 'segmentation'),
    ],
)
def test_the_task_of_a_model(scope, kind, task):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    config = Config(dict(model=dict(type=kind), default_scope=scope))
    assert task_of(config) == task


def test_the_task_of_a_class():
    """As pure-Python configs write it, and of a class of one's own."""
    mmseg = pytest.importorskip('mmseg.models')

    class Own(mmseg.EncoderDecoder):
        pass

    assert task_of(Config(dict(model=dict(type=Own)))) == 'segmentation'


def test_a_model_that_is_not_there():
    with pytest.raises(DistillError, match=r"model\.type 'Nonsense' is not registered"):
        task_of(Config(dict(model=dict(type='Nonsense'))))


def test_head_is_the_module_of_the_task():
    terms = load_recipe('binary_kl', 'detection')['terms']
    config = Config(dict(model=dict(bbox_head=dict())))
    found = with_modules(terms, config, 'detection')
    assert {t[side] for t in found.values() for side in ('student', 'teacher')} == {'bbox_head'}
    assert found['box']['weight'] == 0.25 and terms['box']['student'] == 'head'
    assert with_modules(dict(a=dict(student='neck', teacher='head'), b=None), config, 'segmentation') == dict(
        a=dict(student='neck', teacher='decode_head'), b=None
    )
    # Of a model that has one, it is what is meant.
    own = Config(dict(model=dict(head=dict())))
    assert with_modules(dict(a=dict(student='head')), own, 'detection') == dict(a=dict(student='head'))
