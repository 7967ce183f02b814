"""Recipes: every one can be used for the tasks it names, and whoever writes one wrongly is told what is wrong."""

import inspect
import re
import subprocess
import sys

import pytest

import kd_plugins.adapters as adapters
import kd_plugins.losses as losses
from kd_plugins.distiller.schedules import build_schedule
from kd_plugins.distiller.stages import build_stages, check_stages
from kd_plugins.errors import DistillError
from kd_plugins.recipes import (
    FOLDER,
    TASKS,
    check_body,
    description,
    find_recipe,
    load_recipe,
    names,
    read_yaml,
    tasks_of,
)
from kd_plugins.teachers.run import check_alpha

PAIRS = [(name, task) for name in names() for task in tasks_of(name)]
TERM = 'a: {loss: {type: FeatureMSELoss}, student: neck, teacher: neck}'
BODY = f'terms:\n  {TERM}\n'


@pytest.fixture
def write(tmp_path):
    def write(text, name='own.yaml'):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# ---------------------------------------------------------------------- those of the package
@pytest.mark.parametrize(('name', 'task'), PAIRS)
def test_every_recipe_is_made_of_what_is_there(name, task):
    recipe = load_recipe(name, task)
    assert recipe['terms']
    check_stages(build_stages(recipe.get('stages'), check_alpha), recipe['terms'])
    for term in recipe['terms'].values():
        assert set(term) <= {
            'loss',
            'student',
            'teacher',
            'adapter',
            'teacher_adapter',
            'weight',
            'temperature',
            'combine',
        }
        for key, package in (('loss', losses), ('adapter', adapters), ('teacher_adapter', adapters)):
            parts = term.get(key, [])
            for part in parts if isinstance(parts, list) else [parts]:
                if part == 'auto':
                    continue
                options = dict(part)
                made = getattr(package, options.pop('type'))
                assert set(options) <= set(inspect.signature(made).parameters)
        made = dict(term['loss'])
        getattr(losses, made.pop('type'))(**made)
        build_schedule(term.get('weight', 1.0), 'weight')
        build_schedule(term.get('temperature', 1.0), 'temperature')
        for side in ('student', 'teacher'):
            root = re.match(r'\w+', term[side].removeprefix('*:')).group()
            # The words that mean something in every zoo; a layer of one architecture is said to be one in the file.
            assert root in ('head', 'neck', 'backbone', 'logits', 'dist_logits', 'stages') or name == 'vit_attention'


def test_there_are_recipes_for_every_task():
    assert {task for _, task in PAIRS} == set(TASKS)
    assert set(names()) == {name for name, _ in PAIRS}
    assert 'cwd' in names('detection') and 'cwd' in names('segmentation') and 'cwd' not in names('classification')
    # What a comparison calls its own arms.
    assert not {'default', 'native', 'plain', 'teacher'} & set(names())


@pytest.mark.parametrize('name', names())
def test_every_recipe_is_short_and_cites_its_paper(name):
    lines = (FOLDER / f'{name}.yaml').read_text().splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 120
    assert lines[0].startswith('# ') and description(name) == lines[0][2:]
    assert re.search(r'arXiv \d{4}\.\d{4,5}', lines[0]) and len(description(name)) <= 57, 'one line of the list'


def test_measured_values_stay():
    """The figures in README were measured with these."""
    logits = load_recipe('cwd', 'segmentation')['terms']['logits']
    assert logits == dict(
        loss=dict(type='ChannelWiseDivLoss', temperature=4.0), student='head', teacher='head', weight=3.0
    )
    assert load_recipe('cwd', 'detection')['terms']['neck']['student'] == 'neck'
    assert load_recipe('kl', 'classification')['alpha'] == 0.9
    weight = load_recipe('dkd', 'classification')['terms']['logits']['weight']
    assert weight == dict(type='linear', start=0.05, end=1.0, until=1 / 12)


def test_nobody_shares_what_was_read():
    load_recipe('cwd', 'detection')['terms']['neck']['weight'] = 99
    assert load_recipe('cwd', 'detection')['terms']['neck']['weight'] == 3.0


def test_no_framework_is_imported():
    code = "import sys, kd_plugins.recipes as r; r.load_recipe('cwd', 'detection'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not {m.partition('.')[0] for m in loaded} & {'torch', 'numpy', 'mmengine', 'mmdet', 'ultralytics', 'timm'}


# ---------------------------------------------------------------------- found by name or file
def test_names_and_files(write, tmp_path, monkeypatch):
    assert find_recipe('cwd') == FOLDER / 'cwd.yaml'
    path = write(BODY)
    assert str(find_recipe(path)) == path
    monkeypatch.chdir(tmp_path)
    assert load_recipe('own.yaml', 'detection') == load_recipe('./own.yaml', 'segmentation')
    # A folder or a file without a suffix is not what a name means.
    (tmp_path / 'cwd').mkdir()
    (tmp_path / 'kl').write_text('')
    assert find_recipe('cwd') == FOLDER / 'cwd.yaml' and find_recipe('kl') == FOLDER / 'kl.yaml'


@pytest.mark.parametrize(
    ('recipe', 'words'),
    [
        ('cwdd', "--kd: there is no recipe 'cwdd'; did you mean 'cwd'?"),
        ('qqqqqq', 'choose from: .*binary_kl'),
        ('ownrecipe', r"did you mean 'ownrecipe\.yaml'"),
        ('ownrecip.yaml', r"--kd: the file 'ownrecip\.yaml' does not exist; in '\.': did you mean 'ownrecipe\.yaml'"),
        ('no/where.yaml', "'no/where.yaml' does not exist"),
        ('configs/kd/cwd.py', "does not exist; did you mean 'cwd'"),
        ('', "no recipe ''"),
        (3, 'must be the name or the file of a recipe, got 3'),
        (None, 'got None'),
    ],
)
def test_what_is_not_there(recipe, words, write, tmp_path, monkeypatch):
    write(BODY, 'ownrecipe.yaml')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistillError, match=words) as caught:
        load_recipe(recipe, 'detection', '--kd')
    assert len(str(caught.value)) < 400 and '\n' not in str(caught.value)


# ---------------------------------------------------------------------- what a file says
def test_one_body_for_every_task_or_one_for_each(write):
    plain = write(f'alpha: 0.5\nstart: 1\nstop: 9\n{BODY}')
    assert load_recipe(plain, 'detection') == load_recipe(plain, 'classification')
    assert {k: v for k, v in load_recipe(plain, 'detection').items() if k != 'terms'} == dict(
        alpha=0.5, start=1, stop=9
    )
    each = write(f'detection:\n  terms: {{{TERM}}}\nsegmentation:\n  alpha: 0.3\n  terms: {{{TERM}}}\n', 'each.yml')
    assert 'alpha' not in load_recipe(each, 'detection') and load_recipe(each, 'segmentation')['alpha'] == 0.3


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('term: {}\n', "has no option 'term': did you mean 'terms'"),
        ('detections: {}\n', "has no option 'detections': did you mean 'detection'"),
        (f'detection: {{aplha: 0.5, terms: {{{TERM}}}}}\n', "detection has no option 'aplha': did you mean 'alpha'"),
        (f'alpha: 0.5\ndetection: {{terms: {{{TERM}}}}}\n', "'alpha' stands beside 'detection'"),
        ('detection: 3\n', "must be a mapping with 'terms', got 3"),
        ('detection:\n', "must be a mapping with 'terms', got None"),
        ('alpha: 0.5\n', "needs 'terms'"),
        ('terms: [a]\n', "needs 'terms'"),
        ('', "needs 'terms'"),
        ('- a\n', 'must be a mapping'),
        ('terms: [\n', 'is not valid YAML'),
        (f'terms: {{{TERM}, {TERM}}}\n', "'a' is written twice"),
        (f'{BODY}{BODY}', "'terms' is written twice"),
        (f'segmentation: {{terms: {{{TERM}}}}}\n', "is for segmentation, not for detection; .*'cwd'"),
    ],
)
def test_what_is_wrong_is_said(text, words, write):
    with pytest.raises(DistillError, match=words) as caught:
        load_recipe(write(text), 'detection')
    assert '\n' not in str(caught.value)


def test_a_recipe_for_another_task_names_those_that_fit():
    with pytest.raises(DistillError) as caught:
        load_recipe('yolo_logit', 'segmentation')
    assert str(caught.value) == (
        "recipe 'yolo_logit' is for detection, not for segmentation; "
        "choose from: 'born_again', 'cosine', 'cwd', 'ema', 'feature', 'mgd', 'multi_teacher', 'pixel_kl', 'pkd', "
        "'progressive'."
    )
    with pytest.raises(DistillError, match=r'is for detection and segmentation, not for classification; .*deit_hard'):
        load_recipe('cwd', 'classification')


def test_python_is_for_mmengine(write):
    with pytest.raises(DistillError, match=r"own\.py' is a Python config, which only kd-plugins train --kd reads"):
        load_recipe(write('terms = dict()\n', 'own.py'), 'detection')
    with pytest.raises(DistillError, match=r"own\.txt' is not a \.yaml file"):
        load_recipe(write(BODY, 'own.txt'), 'detection')


def test_traps_of_yaml(write):
    text = 'a: 1e-3\nb: -2E5\nc: .5e2\nd: 1.e3\ne: 1e\nf: v1e3\ng: 12\nh: None\n'
    text += 'i: [1e-3, {x: 2e0}]\nj: "1e-3"\nk: None of it\n'
    assert read_yaml(write(text), 'it') == dict(
        a=0.001, b=-200000.0, c=50.0, d=1000.0, e='1e', f='v1e3', g=12, h=None, i=[0.001, {'x': 2.0}], j='1e-3',
        k='None of it',
    )  # fmt: skip
    # Merging is not writing twice, wherever what is merged stands.
    text = 'z: {y: &b {<<: &a {p: 1}, q: 2}}\nw: {<<: *b, p: 3}\nv: {<<: *b}\n'
    assert read_yaml(write(text), 'it') == dict(
        z=dict(y=dict(p=1, q=2)), w=dict(p=3, q=2), v=dict(p=1, q=2)
    )  # fmt: skip


def test_a_body_may_come_from_elsewhere():
    body = dict(terms=dict(a=dict(loss=dict(type='KLDivLoss'), student='logits', teacher='logits')))
    check_body(body, "recipe 'x'")
    with pytest.raises(DistillError, match="recipe 'x' has no option 'optimizer'"):
        check_body(dict(body, optimizer={}), "recipe 'x'")
