"""``yolo-kd``: which words are ours, what they mean, and that everything else reaches Ultralytics as it was."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kd_plugins import autoload
from kd_plugins.distiller import build_terms
from kd_plugins.errors import DistillError
from kd_plugins.on_import import VARIABLE
from kd_plugins.yolo import DistillCallback, DistillOptions
from kd_plugins.yolo.cli import by_default, choose, help_text, main, option_docs, overrides_of, parse_value, split
from kd_plugins.yolo.recipe import read_options, read_recipe, recipe_of_run, write_recipe

REPO = Path(__file__).parents[3]
RECIPES = sorted((REPO / 'configs' / 'yolo').glob('*.yaml'))


# ---------------------------------------------------------------------- words
def test_split():
    words = ['train', 'model=yolo11n.yaml', 'kd_teacher=a b.pt', 'imgsz=64', '--kd_cls=1e-3', 'kd_box', '=', '2,']
    rest, given = split(words)
    assert rest == ['train', 'model=yolo11n.yaml', 'imgsz=64']
    assert given == {'teacher': 'a b.pt', 'cls': 0.001, 'box': 2}
    assert split(['kd=my kd.yaml', 'kd_trusted', 'kd_stop=None']) == (
        [],
        {'kd': 'my kd.yaml', 'trusted': True, 'stop': None},
    )


def test_words_without_ours_are_not_touched():
    words = ['predict', 'source', '=', 'a b', 'imgsz=[64,', '64]', '--half,', 'name=kd']
    assert split(words) == (words, {})


@pytest.mark.parametrize(
    'text, value',
    [
        ('1', 1),
        ('1e-3', 0.001),
        ('True', True),
        ('false', False),
        ('none', None),
        ('yolo11x.pt', 'yolo11x.pt'),
        ('abc', 'abc'),
        ('[a, b c]', ['a', 'b c']),
        ("['a','b']", ['a', 'b']),
        ("('a', 'b')", ['a', 'b']),
        ('{pedestrian: person}', {'pedestrian': 'person'}),
        ("{'a': 'b', 'c': 'd'}", {'a': 'b', 'c': 'd'}),
        ("dict(type='linear', start=0, end=1.5)", {'type': 'linear', 'start': 0, 'end': 1.5}),
        ("dict(type='X', inner=dict(a=[1, 2]))", {'type': 'X', 'inner': {'a': [1, 2]}}),
        ('{type: linear, start: 0, end: -1}', {'type': 'linear', 'start': 0, 'end': -1}),
        ('__import__("os").getcwd()', '__import__("os").getcwd()'),
    ],
)
def test_values(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize('word', ['kd_class_map={car:', 'kd_cls=dict(type=linear', 'kd_cls=dict(**x)', 'kd_classes={a'])
def test_half_a_value_is_refused(word):
    with pytest.raises(DistillError, match=r"kd_\w+='.*' cannot be read: .*in quotes"):
        split([word])


@pytest.mark.parametrize(
    'word, message',
    [
        ('kd_teachr=a.pt', "no option 'kd_teachr': did you mean 'kd_teacher'"),
        ('kd-cls=1', "no option 'kd-cls': did you mean 'kd_cls'"),
        ('KD_CLS=1', "no option 'KD_CLS'"),
        ('kdcls=1', "did you mean 'kd_cls'"),
        ('kd_cls', 'kd_cls needs a value, e.g. kd_cls=1.0'),
        ('kd_teacher=', 'kd_teacher needs a value, e.g. kd_teacher=yolo11x.pt'),
        ('kd', 'kd needs a value, e.g. kd=kd.yaml'),
        ('kd_classes=[a', "unmatched '\\['"),
    ],
)
def test_wrong_words(word, message):
    with pytest.raises(DistillError, match=message):
        split(['train', word])


def test_overrides(tmp_path):
    file = tmp_path / 'run.yaml'
    file.write_text('mode: val\nmodel: a.pt\nresume: x.pt\n')
    assert overrides_of(['train', 'resume', 'model=last.pt']) == dict(mode='train', resume=True, model='last.pt')
    assert overrides_of(['detect', 'mode=val'])['mode'] == 'val'
    found = overrides_of([f'cfg={file}', 'model=b.pt', 'imgsz='])
    assert (found['mode'], found['model'], found['resume']) == ('val', 'b.pt', 'x.pt')
    assert overrides_of(['a=['])['mode'] == 'train'  # the default of Ultralytics; it reports the bracket


# ---------------------------------------------------------------------- what they mean
TRAIN = dict(mode='train')


def test_plain_commands_are_plain():
    assert choose(TRAIN, {}) is None and choose(dict(mode='predict', resume=True), {}) is None


def test_recipe_and_changes_to_it(tmp_path):
    recipe = tmp_path / 'kd.yaml'
    recipe.write_text('teacher: a.pt\ncls: 2.0\nbox: 0.5\n')
    options = choose(TRAIN, dict(kd=str(recipe), cls=1, stop=3))
    assert options == DistillOptions('a.pt', cls=1, box=0.5, stop=3)
    assert choose(TRAIN, dict(teacher='b.pt')) == DistillOptions('b.pt')


@pytest.mark.parametrize(
    'overrides, given, message',
    [
        (TRAIN, dict(cls=1), 'kd_teacher is missing'),
        (TRAIN, dict(teacher='a.pt', cls='abc'), "^kd_cls must be a number or a schedule, got 'abc'"),
        (dict(mode='val'), dict(teacher='a.pt'), "for training, and the mode is 'val': write yolo-kd train"),
        (dict(mode='train', resume=True), {}, 'resume needs the checkpoint.*None'),
        (dict(mode='train', resume='nowhere/last.pt'), {}, 'resume needs the checkpoint.*nowhere'),
    ],
)
def test_refused(overrides, given, message):
    with pytest.raises(DistillError, match=message):
        choose(overrides, given)


class Session:
    """The checked session of a run, as far as its record is concerned."""

    def __init__(self, terms):
        self.terms = build_terms(terms)


FACTS = dict(classifier=False, end_to_end=False, masks=False)


def record(path, options):
    """Write the kd.yaml that a run with some options leaves."""
    run = options.expand(**FACTS)
    write_recipe(path, options, run, Session(run.terms))


def stands_for(options):
    return options.expand(**FACTS).to_dict()


def test_objects_are_named_in_the_record(tmp_path):
    """The run goes on; who resumes it is told what the file cannot hold."""
    from torch import nn

    from kd_plugins.teachers.from_module import resolve

    path = tmp_path / 'kd.yaml'
    record(path, DistillOptions(dict(module=nn.Linear, options=dict(sizes=(1, 2)), checkpoint=tmp_path / 'a.pth')))
    teacher = read_options(path).teacher
    assert resolve(teacher['module']) is nn.Linear and teacher['options'] == dict(sizes=[1, 2])
    assert teacher['checkpoint'] == str(tmp_path / 'a.pth')
    record(path, DistillOptions(dict(module=nn.Linear(2, 2))))
    with pytest.raises(DistillError, match=r"'package\.module:factory', got 'a Linear that was in memory'"):
        resolve(read_options(path).teacher['module'])


def write_last(folder, columns=('train/box_loss', 'train/kdcls_loss')):
    """The last.pt of a run whose results.csv has some columns."""
    import torch

    last = folder / 'weights' / 'last.pt'
    last.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'model': None, 'train_results': {c: [0.5] for c in columns}}, last)
    return last


def test_resume_takes_the_recipe_of_the_run(tmp_path):
    last = write_last(tmp_path / 'run')
    resume = dict(mode='train', resume=True, model=str(last))
    with pytest.raises(DistillError, match=r'no kd\.yaml.*restore the file or name one with kd='):
        choose(resume, {})
    # Options alone would silently leave the others at their defaults.
    with pytest.raises(DistillError, match=r'no kd\.yaml'):
        choose(resume, dict(teacher='b.pt'))
    record(tmp_path / 'run' / 'kd.yaml', DistillOptions('a.pt', cls=2.0))
    assert stands_for(choose(resume, {})) == stands_for(DistillOptions('a.pt', cls=2.0))
    moved = choose(dict(mode='train', resume=str(last)), dict(teacher='moved.pt'))
    assert stands_for(moved) == stands_for(DistillOptions('moved.pt', cls=2.0))
    changed = choose(resume, dict(cls=0.5))
    assert stands_for(changed) == stands_for(DistillOptions('a.pt', cls=0.5))
    other = tmp_path / 'other.yaml'
    other.write_text('teacher: c.pt\n')
    assert choose(resume, dict(kd=str(other))) == DistillOptions('c.pt')


def test_a_recipe_of_an_earlier_run_in_the_folder_is_refused(tmp_path):
    """A plain run leaves no kd.yaml; what is there is not how it was trained."""
    run = tmp_path / 'run'
    record_of = lambda columns: choose(dict(mode='train', resume=str(write_last(run, columns))), {})  # noqa: E731
    write_last(run)
    record(run / 'kd.yaml', DistillOptions('a.pt'))
    with pytest.raises(DistillError, match=r'is left over from another run.*yolo train resume.*kd='):
        record_of(('train/box_loss', 'val/box_loss'))
    assert record_of(('train/box_loss', 'train/kdfea_loss')).teacher == 'a.pt'
    # Before its first epoch was logged nobody knows.
    assert record_of(()).teacher == 'a.pt'
    last = write_last(run, ('train/box_loss',))
    assert choose(dict(mode='train', resume=str(last)), dict(kd=str(run / 'kd.yaml'))).teacher == 'a.pt'


def test_resume_of_a_checkpoint_that_was_copied_elsewhere(tmp_path):
    """Ultralytics continues in the folder that the checkpoint remembers."""
    import torch

    from tests.integration.yolo_lab import build

    run, copy = tmp_path / 'run', tmp_path / 'last.pt'
    torch.save({'model': build('yolo11n.yaml').half(), 'train_args': {'save_dir': str(run)}}, copy)
    with pytest.raises(DistillError, match=re.escape(f'the run in {str(run)!r} has no kd.yaml')):
        recipe_of_run(copy)
    run.mkdir()
    record(run / 'kd.yaml', DistillOptions('a.pt'))
    assert recipe_of_run(copy) == str(run / 'kd.yaml')


# ---------------------------------------------------------------------- recipes
@pytest.mark.parametrize('file', RECIPES, ids=lambda f: f.stem)
def test_our_recipes(file):
    """They are valid, say how they are used, and their losses exist."""
    options = DistillOptions(**{'teacher': 'a.pt', **read_recipe(file)})
    known = []
    for classifier in (True, False):
        try:
            run = options.expand(classifier=classifier, end_to_end=True, masks=True)
        except DistillError:
            continue
        known.append(build_terms(run.terms))
    assert known
    assert f'kd=kd_plugins::yolo/{file.name}' in file.read_text()


def test_there_are_recipes():
    assert len(RECIPES) >= 6


@pytest.mark.parametrize(
    'name, text, message',
    [
        ('kd.yaml', 'teachr: a.pt\n', "kd.yaml' has no option 'teachr': did you mean 'teacher'"),
        ('kd.yaml', 'cls: [\n', 'is not valid YAML'),
        ('kd.yaml', '- a\n', 'is not valid YAML|must be a mapping'),
        ('kd.yaml', 'cls: 1.0\n', "kd.yaml' needs 'teacher'"),
        ('kd.yaml', 'teacher: a.pt\nbox: .nan\n', 'box must be a finite number'),
        ('kd.txt', 'teacher: a.pt\n', 'is not a .yaml file'),
    ],
)
def test_wrong_recipes(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DistillError, match=message):
        read_options(tmp_path / name)


def test_numbers_that_yaml_takes_for_text(tmp_path):
    (tmp_path / 'kd.yaml').write_text('teacher: a.pt\ncls: 1e-3\nbox: 2e0\n')
    options = read_options(tmp_path / 'kd.yaml')
    assert (options.cls, options.box) == (0.001, 2.0)
    (tmp_path / 'kd.yaml').write_text('teacher: a.pt\ncls: much\n')
    with pytest.raises(DistillError, match="'much'"):
        read_options(tmp_path / 'kd.yaml')


def test_a_missing_recipe_names_near_ones(tmp_path):
    (tmp_path / 'logit.yaml').write_text('')
    with pytest.raises(DistillError, match=r"logits\.yaml' does not exist; .*did you mean 'logit\.yaml'"):
        read_recipe(tmp_path / 'logits.yaml')
    with pytest.raises(DistillError, match='does not exist'):
        read_recipe(tmp_path / 'no' / 'kd.yaml')


def test_comments_in_a_recipe_survive_a_run_that_changes_nothing(tmp_path):
    file = tmp_path / 'kd.yaml'
    file.write_text('teacher: a.pt # mine\n')
    record(file, DistillOptions('a.pt'))
    assert file.read_text() == 'teacher: a.pt # mine\n'
    record(file, DistillOptions('a.pt', cls=2.0))
    assert stands_for(read_options(file)) == stands_for(DistillOptions('a.pt', cls=2.0))


def test_a_run_records_what_its_options_stand_for(tmp_path, begin):
    """Also which loss was chosen, with its options; and read again it is the same run."""
    options = dict(
        cls=dict(type='linear', start=1.0, end=0.5), feature=0.5, feature_loss='mgd', temperature=2.0, start=1
    )
    run = begin(box_loss=dict(type='AutoBoxLoss'), **options)
    found = read_options(run.trainer.save_dir / 'kd.yaml')
    assert list(found.terms) == ['cls', 'box', 'feature'] and found.cls is None and found.start == 1
    assert found.terms['cls']['loss']['temperature'] == 2.0
    assert found.terms['box']['loss'] == {'type': 'LocalizationDistillLoss', 'temperature': 10.0, 'foreground': True}
    assert found.teacher == run.callback.options.teacher and os.path.isabs(found.teacher)
    again = begin(terms=found.terms, start=1)
    assert again.columns == run.columns
    for one, two in zip(run.session.terms.values(), again.session.terms.values(), strict=True):
        assert type(one.loss) is type(two.loss) and str(one.weight) == str(two.weight) and one.student == two.student


# ---------------------------------------------------------------------- handing over
@pytest.fixture
def ultralytics_command(monkeypatch):
    """What Ultralytics' entry point was called with, and the callbacks it would have given to a model."""
    import ultralytics.cfg
    from ultralytics.utils.callbacks import get_default_callbacks

    calls = []

    def entrypoint():
        calls.append((list(ultralytics.cfg.ARGV), get_default_callbacks()))
        if 'explode' in ultralytics.cfg.ARGV:
            raise RuntimeError('as asked')

    monkeypatch.setattr(ultralytics.cfg, 'entrypoint', entrypoint)
    return calls


def owners(callbacks):
    found = (getattr(c, '__self__', None) for handlers in callbacks.values() for c in handlers)
    return list({id(o): o for o in found if isinstance(o, DistillCallback)}.values())


@pytest.mark.parametrize(
    'words', [['predict', 'source=a b'], ['checks'], ['solutions', 'help'], ['train', 'epochs =1']]
)
def test_plain_words_reach_ultralytics(ultralytics_command, words):
    before = list(sys.argv)
    assert main(words) == 0
    ((argv, callbacks),) = ultralytics_command
    assert argv[1:] == words and os.path.basename(argv[0]) == 'yolo' and not owners(callbacks)
    assert sys.argv == before


@pytest.mark.parametrize('end', ['imgsz=64', 'explode'])
def test_the_callback_is_a_default_only_meanwhile(ultralytics_command, teacher_file, monkeypatch, end):
    from ultralytics.utils.callbacks import default_callbacks

    file = teacher_file('small.yaml')
    monkeypatch.chdir(Path(file).parent)
    before, argv = {k: list(v) for k, v in default_callbacks.items()}, list(sys.argv)
    words = ['detect', 'train', 'model=yolo11n.yaml', 'kd_teacher=teacher.pt', 'kd_cls=2', end]
    if end == 'explode':
        with pytest.raises(RuntimeError, match='as asked'):
            main(words)
    else:
        assert main(words) == 0
    ((seen, callbacks),) = ultralytics_command
    assert seen[1:] == ['detect', 'train', 'model=yolo11n.yaml', end]
    (callback,) = owners(callbacks)
    # Absolute, as the processes on several GPUs start in another folder.
    assert callback.options == DistillOptions(file, cls=2) and os.path.isabs(callback.options.teacher)
    assert default_callbacks == before and sys.argv == argv


def test_default_callback_reaches_several_processes(teacher_file):
    """Each model has its own copy, one for all events, and it travels by cloudpickle, which DDP uses."""
    cloudpickle = pytest.importorskip('cloudpickle')
    from ultralytics import YOLO

    callback = DistillCallback(teacher_file('small.yaml'), cls=2)
    with by_default(callback):
        models = [YOLO('yolo11n.yaml', verbose=False) for _ in range(2)]
    (one,), (two,) = (owners(m.callbacks) for m in models)
    assert len({id(one), id(two), id(callback)}) == 3
    (arrived,) = owners(cloudpickle.loads(cloudpickle.dumps(models[0].callbacks)))
    assert arrived.options == callback.options


def test_errors_are_one_sentence(capsys):
    assert main(['train', 'kd_teachr=a.pt']) == 2
    error = capsys.readouterr().err
    assert error.startswith("yolo-kd: there is no option 'kd_teachr'") and error.count('\n') == 1


def test_help(capsys):
    for words in ([], ['help'], ['--help'], ['train', '-h']):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(f'  kd_{name}  [' in text for name in DistillOptions.names())
    assert 'kd_teacher  [None]' in text and "kd_branch  ['one2many']" in text and 'Weight of the box term' in text
    assert '``' not in text and text.strip() == help_text()
    assert set(option_docs()) == set(DistillOptions.names())


# ---------------------------------------------------------------------- the opt-in for the unmodified command
def run_python(code, *folders, **environment):
    """A fresh interpreter that reads the .pth files of some folders."""
    start = ''.join(f'site.addsitedir({str(f)!r}); ' for f in folders)
    return subprocess.run(
        [sys.executable, '-c', f'import site, sys; {start}{code}'],
        capture_output=True,
        text=True,
        check=True,
        env={**{k: v for k, v in os.environ.items() if k != VARIABLE}, 'PYTHONPATH': str(REPO), **environment},
    ).stdout


def test_switch(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    folder = str(tmp_path)
    assert autoload.status(folder).startswith('not enabled') and not list(tmp_path.iterdir())
    assert 'Enabled by' in autoload.enable(folder)
    assert [f.name for f in tmp_path.iterdir()] == [autoload.PTH] and autoload.status(folder).startswith('enabled')
    monkeypatch.setenv(VARIABLE, 'missing.yaml')
    assert 'missing.yaml, which does not exist\nyolo train distils' in autoload.status(folder)
    assert 'was removed' in autoload.disable(folder) and not list(tmp_path.iterdir())
    assert 'nothing was changed' in autoload.disable(folder)
    with pytest.raises(DistillError, match='cannot be written'):
        autoload.enable(str(tmp_path / 'no'))


def test_switch_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(autoload, 'pth_file', lambda folder=None: str(tmp_path / autoload.PTH))
    for word, text in (
        ('status', 'not enabled'),
        ('enable', 'Enabled'),
        ('status', 'enabled'),
        ('disable', 'Disabled'),
    ):
        assert main([word]) == 0
        assert capsys.readouterr().out.startswith(text)
    assert main(['enable', 'now']) == 2


def test_the_file_is_one_line_that_is_free_when_off(tmp_path):
    autoload.enable(str(tmp_path))
    (line,) = (tmp_path / autoload.PTH).read_text().splitlines()
    assert line.startswith('import ')  # `site` executes such lines only
    found = run_python(
        "print([m for m in sys.modules if m[:3] in ('kd_', 'ult', 'tor')], len(sys.meta_path))", tmp_path
    )
    assert found == run_python("print([m for m in sys.modules if m[:3] in ('kd_', 'ult', 'tor')], len(sys.meta_path))")
    assert found.startswith('[]')


def test_set_but_without_ultralytics_nothing_heavy_is_imported(tmp_path):
    autoload.enable(str(tmp_path))
    code = "print(sorted(m for m in sys.modules if m.split('.')[0] in ('kd_plugins', 'torch', 'ultralytics')))"
    found = run_python(code, tmp_path, **{VARIABLE: 'kd.yaml'})
    assert found.strip() == "['kd_plugins', 'kd_plugins.autoload', 'kd_plugins.on_import']"


def test_set_and_ultralytics_imported(tmp_path):
    """One entry per event, no finder left, an absolute path, and the recipe is not read before a training."""
    autoload.enable(str(tmp_path))
    code = (
        'import os; os.chdir("/"); from ultralytics import YOLO; m = YOLO("yolo11n.yaml", verbose=False);'
        'own = [(e, c.__self__) for e, h in m.callbacks.items() for c in h if hasattr(c, "__self__")];'
        'print("FOUND", [e for e, _ in own], {o.recipe for _, o in own}, len({id(o) for _, o in own}),'
        ' [f for f in sys.meta_path if "kd_plugins.autoload" in str(type(f))], "kd_plugins.yolo" in sys.modules)'
    )
    found = run_python(code, tmp_path, **{VARIABLE: 'kd.yaml'})
    events = list(autoload.EVENTS)
    assert f'FOUND {events} { ({os.path.abspath("kd.yaml")}) } 1 [] False' in found


def test_values_are_not_nan():
    with pytest.raises(DistillError, match="kd_cls must be a number or a schedule, got 'nan'"):
        choose(TRAIN, dict(teacher='a.pt', cls=parse_value('nan')))
    with pytest.raises(DistillError, match='kd_cls must be a finite number >= 0, got inf'):
        choose(TRAIN, dict(teacher='a.pt', cls=math.inf))
