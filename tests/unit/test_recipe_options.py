"""Several recipes at once, and the words that change them."""

import pytest

from kd_plugins.distiller.terms import loss_parameters
from kd_plugins.errors import DistillError
from kd_plugins.recipes import load_recipe
from kd_plugins.recipes.options import apply_options, check_names, combinations, load_recipes, read_words, recipe_list
from kd_plugins.teachers.run import RunOptions

TEACHER = dict(config='t.py', checkpoint='t.pth')


def applied(recipe, task, *words, where='--kd-options'):
    body = {**load_recipes(recipe, task), 'teacher': TEACHER}
    return apply_options(body, read_words(words, where), loss_parameters(), where)


# ---------------------------------------------------------------------- words
def test_values_are_yaml():
    found = read_words(
        ['weight=1e-3', 'stop=280', 'a.loss.beta=2', 'a.weight={type: linear, start: 1, end: 0}', 'b=None', 'c=[x, y]']
    )
    assert found == dict(
        weight=0.001, stop=280, a=dict(loss=dict(beta=2), weight=dict(type='linear', start=1, end=0)), b=None,
        c=['x', 'y'],
    )  # fmt: skip


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['weight'], "'weight' is no name=value"),
        (['=3'], "'=3' is no name=value"),
        (['a..b=3'], 'is no name=value'),
        (['weight='], 'is no name=value'),
        (['weight=1', 'weight=3'], "'weight' is given twice; .*kd-plugins compare"),
        (['a=1', 'a.b=3'], "goes into 'a', which has a value already"),
        (['a={x'], 'is not valid YAML'),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(DistillError, match=message) as caught:
        read_words(words)
    assert len(str(caught.value)) < 400 and '\n' not in str(caught.value)


def test_combinations():
    assert combinations([]) == [[]]
    assert combinations([['weight=1,3', 'temperature=2']]) == [
        ['weight=1', 'temperature=2'], ['weight=3', 'temperature=2'],
    ]  # fmt: skip
    assert combinations([['weight=1,3', 'alpha=0.5,0.7']])[1:3] == [
        ['weight=1', 'alpha=0.7'], ['weight=3', 'alpha=0.5'],
    ]  # fmt: skip
    assert combinations([['weight=1', 'weight=3']]) == [['weight=1'], ['weight=3']]
    # Each time that the option is given stands for itself.
    assert combinations([['weight=1', 'alpha=0.5'], ['weight=3', 'alpha=0.7']]) == [
        ['weight=1', 'alpha=0.5'], ['weight=3', 'alpha=0.7'],
    ]  # fmt: skip
    assert combinations([['weight={type: linear, start: 1, end: 0},3', 'a="x,y"']]) == [
        ['weight={type: linear, start: 1, end: 0}', 'a="x,y"'], ['weight=3', 'a="x,y"'],
    ]  # fmt: skip


# ---------------------------------------------------------------------- several recipes
def test_terms_of_several_recipes(tmp_path, monkeypatch):
    found = load_recipes(['pixel_kl', 'cwd'], 'segmentation')['terms']
    assert list(found) == ['logits', 'logits_cwd'], 'a second term of one name is named by its recipe'
    assert found['logits'] == load_recipe('pixel_kl', 'segmentation')['terms']['logits']
    assert found['logits_cwd'] == load_recipe('cwd', 'segmentation')['terms']['logits']
    assert load_recipes('pixel_kl, cwd', 'segmentation')['terms'] == found
    # What both have alike is taken once.
    found = load_recipes(['vit_feature', 'vit_attention'], 'classification')['terms']
    assert list(found) == ['logits', 'last', 'before', 'attention']
    assert load_recipes('cwd', 'detection') == load_recipe('cwd', 'detection')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a,b-c.yaml').write_text('terms: {neck: {loss: {type: FeatureMSELoss}, student: neck, teacher: neck}}')
    assert recipe_list('a,b-c.yaml') == ['a,b-c.yaml'] and recipe_list(['x,y', 'z']) == ['x', 'y', 'z']
    found = load_recipes(['cwd', 'a,b-c.yaml', 'pkd', 'pkd'], 'detection')['terms']
    assert list(found) == ['neck', 'neck_a_b_c', 'neck_pkd']


def test_recipes_that_disagree():
    assert load_recipes(['dist', 'kl'], 'classification')['alpha'] == 0.9
    with pytest.raises(DistillError, match=r"'kl' has alpha=0.9 and 'deit_soft' has 0.1; say which") as caught:
        load_recipes(['kl', 'deit_soft'], 'classification')
    assert len(str(caught.value)) < 400
    run = RunOptions.read(dict(teacher=TEACHER, recipe=['kl', 'deit_soft'], options=dict(alpha=0.5)), 'classification')
    assert run.alpha == 0.5 and list(run.terms) == ['logits', 'logits_deit_soft']
    with pytest.raises(DistillError, match='is for segmentation, not for detection'):
        load_recipes(['cwd', 'pixel_kl'], 'detection')


# ---------------------------------------------------------------------- changes
def test_short_names_are_of_every_term_that_has_them():
    found = applied('binary_kl', 'detection', 'weight=3', 'obj_weight=0.5', 'alpha=0.7', 'start=2', 'stop=280')
    assert [t['weight'] for t in found['terms'].values()] == [3, 3]
    assert 'obj_weight' not in found['terms']['cls']['loss'] and found['terms']['box']['loss']['obj_weight'] == 0.5
    assert (found['alpha'], found['start'], found['stop']) == (0.7, 2, 280) and found['teacher'] == TEACHER
    # A loss without a temperature is not given one.
    found = applied('vit_attention', 'classification', 'temperature=2')['terms']
    assert found['logits']['temperature'] == 2 and 'temperature' not in found['attention']
    assert load_recipe('vit_attention', 'classification')['terms']['logits'].get('temperature') is None


def test_names_of_one_term():
    found = applied('binary_kl', 'detection', 'box.weight=3', 'cls.loss.foreground=false', 'box.start=5')['terms']
    assert found['box']['weight'] == 3 and 'weight' not in found['cls'] and found['box']['start'] == 5
    assert found['cls']['loss'] == dict(type='BinaryKLDivLoss', foreground=False)
    assert applied('binary_kl', 'detection', 'box=null')['terms']['box'] is None
    found = applied('dkd', 'classification', 'logits.weight.end=3')['terms']['logits']['weight']
    assert found == dict(type='linear', start=0.05, end=3, until=1 / 12)
    assert applied('cwd', 'detection', 'neck.teacher=backbone')['terms']['neck']['teacher'] == 'backbone'


def test_entries_of_the_teacher():
    assert applied('cwd', 'detection', 'teacher.num_classes=10')['teacher'] == dict(TEACHER, num_classes=10)
    options = dict(recipe='cwd', options=dict(teacher=dict(classes=['a'])))
    for teachers in (dict(teacher=TEACHER), dict(teachers={'': TEACHER})):
        assert RunOptions.read(dict(options, **teachers), 'detection').teachers == {'': dict(TEACHER, classes=['a'])}
    with pytest.raises(DistillError, match='needs one teacher, and there are several'):
        RunOptions.read(dict(options, teachers=dict(a=TEACHER, b=TEACHER)), 'detection')
    assert TEACHER == dict(config='t.py', checkpoint='t.pth')


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['wieght=3'], "nothing has an option 'wieght'; did you mean 'weight'"),
        (['mask_rato=3'], "'mask_rato'; did you mean 'mask_ratio'"),
        (['temperature=3'], "nothing has an option 'temperature'"),
        (['neck.wieght=3'], "term 'neck' has no option 'wieght'; did you mean 'weight'"),
        (['nekc.weight=3'], "nothing has an option 'nekc'; did you mean 'neck"),
        (['neck=3'], r"'neck' is a term; write e.g. neck.weight=3"),
        (['teacher=backbone'], 'write teacher.KEY=..., and of the place where a term is taught TERM.teacher='),
        (['loss=x'], "nothing has an option 'loss'"),
        (['stopp=3'], "did you mean 'stop'"),
    ],
)
def test_what_is_not_there(words, message):
    with pytest.raises(DistillError, match=message) as caught:
        applied('mgd', 'detection', *words)
    text = str(caught.value)
    assert text.startswith('--kd-options: ') and len(text) < 400 and '\n' not in text


def test_a_name_that_one_task_has_waits_for_the_model():
    bodies = [load_recipe('cwd', task) for task in ('detection', 'segmentation')]
    check_names(bodies, dict(logits=dict(weight=3)), loss_parameters())
    with pytest.raises(DistillError, match='gamma'):
        check_names(bodies, dict(gamma=3), loss_parameters())


def test_terms_beside_a_recipe_change_or_replace_its_own():
    def read(**terms):
        return RunOptions.read(dict(teacher=TEACHER, recipe='cwd', terms=terms), 'detection').terms

    full = dict(loss=dict(type='PearsonLoss'), student='neck', teacher='neck')
    assert read(neck=dict(weight=7.0, loss=dict(temperature=2.0)))['neck'] == dict(
        loss=dict(type='ChannelWiseDivLoss', temperature=2.0), student='neck', teacher='neck', weight=7.0
    )
    assert read(neck=full) == dict(neck=full) and list(read(more=full)) == ['neck', 'more']
    assert read(neck=None) == dict(neck=None)


def test_options_that_are_no_mapping():
    for options, message in ((3, 'options must be a mapping'), (['weight=3'], 'must be a mapping')):
        with pytest.raises(DistillError, match=message):
            RunOptions.read(dict(teacher=TEACHER, recipe='cwd', options=options), 'detection')
