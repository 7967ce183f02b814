"""``kd=``: recipes by name, a user's own with a body for each task, and files of options."""

import pytest

pytest.importorskip('ultralytics')

from kd_plugins.errors import DistillError
from kd_plugins.recipes import load_recipe
from kd_plugins.yolo import DistillOptions
from kd_plugins.yolo.cli import choose, help_text, split
from kd_plugins.yolo.recipe import read_options, read_recipe

TRAIN = dict(mode='train')
TERM = '{loss: {type: FeatureMSELoss}, student: neck, teacher: neck, weight: 1e-2}'


def expanded(options, **facts):
    return options.expand(**{**dict(classifier=False, end_to_end=False, masks=False), **facts})


def test_a_name_is_a_recipe_of_the_package():
    options = choose(TRAIN, dict(kd='cwd', teacher='a.pt'))
    assert options == DistillOptions('a.pt', recipe='cwd')
    run = expanded(options)
    assert run.terms == load_recipe('cwd', 'detection')['terms'], 'and no default terms beside them'
    # What is said beside it counts too.
    run = expanded(choose(TRAIN, dict(kd='cwd', teacher='a.pt', box=2.0, stop=5)))
    assert list(run.terms) == ['neck', 'box'] and run.window.stop == 5
    run = expanded(choose(TRAIN, dict(kd='kl', teacher='a.pt')), classifier=True)
    assert run.alpha == 0.9 and run.terms['logits']['loss']['type'] == 'KLDivLoss'


def test_a_name_needs_a_teacher_and_a_fitting_task():
    with pytest.raises(DistillError, match='kd_teacher is missing'):
        choose(TRAIN, dict(kd='cwd'))
    with pytest.raises(DistillError, match=r"recipe 'kl' is for classification, not for detection; .*'cwd'"):
        expanded(choose(TRAIN, dict(kd='kl', teacher='a.pt')))


@pytest.mark.parametrize('name', ['cwdd', 'cwdd.yaml'])
def test_what_is_not_there_is_said_at_once(name, tmp_path, monkeypatch):
    (tmp_path / 'cwd.yaml').write_text('')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistillError, match=r"^kd: .*did you mean 'cwd"):
        choose(TRAIN, dict(kd=name, teacher='a.pt'))


def test_files_of_terms_and_of_bodies(tmp_path):
    plain, each = tmp_path / 'plain.yaml', tmp_path / 'each.yaml'
    plain.write_text(f'teacher: a.pt\nalpha: 0.5\nterms: {{a: {TERM}}}\n')
    options = read_options(plain)
    assert options.alpha == 0.5 and expanded(options).terms['a']['weight'] == 0.01
    each.write_text(f'detection: {{start: 3, terms: {{a: {TERM}}}}}\n')
    options = choose(TRAIN, dict(kd=str(each), teacher='a.pt'))
    run = expanded(options)
    assert list(run.terms) == ['a'] and run.window.start == 3
    assert expanded(options.replace(start=1)).window.start == 1
    each.write_text(f'detection: {{trems: {{a: {TERM}}}}}\n')
    with pytest.raises(DistillError, match=r"each\.yaml', detection has no option 'trems': did you mean 'terms'"):
        expanded(options)


def test_what_yaml_takes_for_text_at_any_depth(tmp_path):
    file = tmp_path / 'kd.yaml'
    file.write_text(
        'teacher: a.pt\ncls: {type: linear, start: 1e-3, end: 2e0}\nstop: None\ncls_loss: {type: X, a: 1e3}\n'
    )
    found = read_recipe(file)
    assert found['cls'] == dict(type='linear', start=0.001, end=2.0) and found['stop'] is None
    assert found['cls_loss']['a'] == 1000.0
    file.write_text('')
    assert read_recipe(file) == {}, 'all defaults'
    file.write_text('teacher: a.pt\ncls: 1\ncls: 2\n')
    with pytest.raises(DistillError, match="'cls' is written twice"):
        read_recipe(file)


def test_help_says_where_names_are_listed():
    assert 'kd-plugins recipes' in help_text()


# ---------------------------------------------------------------------- several, and changes to them
def chosen(*words):
    rest, given = split(['train', *words])
    assert rest == ['train']
    return choose(TRAIN, given)


def test_several_recipes_and_changes_to_them(tmp_path):
    words = ['kd=cwd,pkd', 'kd_teacher=a.pt', 'kd_weight=3', 'kd_neck_pkd.weight=dict(type="linear", start=1, end=0)']
    options = chosen(*words, 'kd_stop=280', 'kd_alpha=0.7', 'kd_temperature=2', 'kd_teacher.input_size=320')
    run = expanded(options)
    assert list(run.terms) == ['neck', 'neck_pkd'] and run.window.stop == 280 and run.alpha == 0.7
    assert run.terms['neck']['weight'] == 3 and run.terms['neck']['temperature'] == 2
    assert run.terms['neck_pkd']['weight'] == dict(type='linear', start=1, end=0)
    assert run.teachers['']['ultralytics'] == 'a.pt' and run.teachers['']['input_size'] == 320
    # What is a kd.yaml brings the teacher along.
    (tmp_path / 'kd.yaml').write_text('teacher: b.pt\nstop: 9\n')
    (tmp_path / 'own.yaml').write_text(f'alpha: 0.5\nterms: {{a: {TERM}}}\n')
    run = expanded(chosen(f'kd=cwd,{tmp_path}/kd.yaml,{tmp_path}/own.yaml', 'kd_a.weight=4'))
    assert list(run.terms) == ['neck', 'a'] and run.terms['a']['weight'] == 4 and run.alpha == 0.5
    assert run.window.stop == 9 and run.teachers['']['ultralytics'] == 'b.pt'


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['kd=cwd', 'kd_wieght=3'], "nothing has an option 'wieght'; did you mean 'weight'"),
        (['kd=cwd', 'kd_neck.wieght=3'], "term 'neck' has no option 'wieght'; did you mean 'weight'"),
        (['kd=mgd', 'kd_temperature=3'], "nothing has an option 'temperature'"),
        (['kd_weight=3'], "there is no option 'kd_weight'"),
        (['kd=cwd,cwdd'], "did you mean 'cwd'"),
    ],
)
def test_changes_to_what_is_not_there(words, message):
    with pytest.raises(DistillError, match=message) as caught:
        expanded(chosen(*words, 'kd_teacher=a.pt'))
    assert len(str(caught.value)) < 400


def test_without_a_recipe_the_teacher_can_be_changed():
    run = expanded(chosen('kd_teacher=a.pt', 'kd_cls=2', 'kd_teacher.input_size=320'))
    assert run.teachers['']['input_size'] == 320 and run.terms['cls']['weight'] == 2
