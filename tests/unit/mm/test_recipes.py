"""Recipes on MMEngine's side: Python files, and what --kd writes into a config."""

import pytest

pytest.importorskip('mmengine')

from mmengine.config import Config

from kd_plugins.errors import DistillError
from kd_plugins.mm.cli import add_distillation
from kd_plugins.mm.recipes import read_recipe
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
        ('alpha = 0.5\n', "own.py' needs 'terms'"),
    ],
)
def test_wrong_python_recipes(tmp_path, text, words):
    (tmp_path / 'own.py').write_text(text)
    with pytest.raises(DistillError, match=words) as caught:
        read_recipe(str(tmp_path / 'own.py'), 'classification')
    assert '\n' not in str(caught.value)


def test_what_kd_writes(tmp_path):
    """The name: what it stands for depends on the model. A Python file's content: the hook reads none."""
    (tmp_path / 'own.py').write_text(f'alpha = 0.5\n{OWN}')
    (tmp_path / 'own.yaml').write_text('terms: {a: {loss: {type: FeatureMSELoss}, student: neck, teacher: neck}}\n')
    for recipe, options in (
        ('cwd', dict(recipe='cwd')),
        (str(tmp_path / 'own.yaml'), dict(recipe=str(tmp_path / 'own.yaml'))),
        (str(tmp_path / 'own.py'), read_recipe(str(tmp_path / 'own.py'), 'detection')),
    ):
        config = Config(dict(model=dict(type='YOLOX'), default_hooks=dict(logger=dict(type='LoggerHook'))))
        add_distillation(config, recipe, 'teacher.py', 'teacher.pth')
        hook = config.default_hooks.to_dict()
        assert set(hook) == {'logger', 'distill'} and config.custom_imports.imports == ['kd_plugins.mm']
        assert hook['distill'] == dict(
            type='kd_plugins.DistillHook', teacher=dict(config='teacher.py', checkpoint='teacher.pth'), **options
        )


def test_a_recipe_is_found_before_anything_is_built():
    config = Config(dict(model=dict(type='YOLOX')))
    with pytest.raises(DistillError, match=r"--kd: there is no recipe 'cwdd'; did you mean 'cwd'"):
        add_distillation(config, 'cwdd', 'teacher.py', 'teacher.pth')
    assert 'default_hooks' not in config
