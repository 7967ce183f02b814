"""The commands as real processes: ``yolo-kd``, and an unmodified ``yolo`` with and without the opt-in."""

import hashlib
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from kd_plugins import autoload
from kd_plugins.on_import import VARIABLE
from kd_plugins.yolo.cli import by_default, main
from tests.integration.yolo_lab import RUN, results, save_teacher, train, weights_hash, write_data

pytest.importorskip('ultralytics')

REPO = Path(__file__).parents[2]
KD = ('train/kdcls_loss', 'train/kdbox_loss')
YOLO_KD = (sys.executable, '-m', 'kd_plugins.yolo.cli')
YOLO = (sys.executable, '-c', 'from ultralytics.cfg import entrypoint; entrypoint()')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp('teacher') / 'teacher.pt', 'yolov8n.yaml')


def words(data, project, **options):
    """A ``train`` command with the settings of all runs here."""
    given = {'model': 'yolo11n.yaml', **RUN, 'data': data, 'project': project, 'name': 'run', **options}
    return ['train', *(f'{k}={v}' for k, v in given.items())]


def run(command, *words, cwd, python=None, **environment):
    """A finished process."""
    command = [python or command[0], *command[1:], *words]
    environment = {**os.environ, 'PYTHONPATH': str(REPO), **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=800)


# ---------------------------------------------------------------------- yolo-kd
@pytest.mark.slow
def test_train_and_resume(data, teacher, tmp_path, capsys):
    """A relative teacher, a recipe beside args.yaml, and a run that goes on with it or not at all."""
    done = run(
        YOLO_KD,
        *words(data, tmp_path, epochs=2, save_period=1, kd_teacher=os.path.basename(teacher), kd_cls=1, kd_box=0.5),
        cwd=Path(teacher).parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'Knowledge distillation is ON' in done.stdout + done.stderr
    folder = tmp_path / 'run'
    assert (folder / 'args.yaml').is_file() and f'teacher: {teacher}' in (folder / 'kd.yaml').read_text()
    whole = results(folder)
    assert all(v > 0 for k in KD for v in whole[k])

    # As if it had been killed after the first epoch.
    lines = (folder / 'results.csv').read_text().splitlines()
    (folder / 'results.csv').write_text('\n'.join(lines[:2]) + '\n')
    last = folder / 'weights' / 'epoch0.pt'
    before = sorted(p.name for p in folder.iterdir())
    os.rename(folder / 'kd.yaml', tmp_path / 'kd.yaml')
    assert main(['train', 'resume', f'model={last}']) == 2
    assert 'has no kd.yaml' in capsys.readouterr().err
    assert len((folder / 'results.csv').read_text().splitlines()) == 2
    os.rename(tmp_path / 'kd.yaml', folder / 'kd.yaml')
    done = run(YOLO_KD, 'train', 'resume', f'model={last}', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = results(folder)
    assert found['epoch'] == [1, 2] and all(v > 0 for k in KD for v in found[k])
    assert found[KD[0]][0] == whole[KD[0]][0] and before == sorted(p.name for p in folder.iterdir())


def test_without_kd_options_it_is_yolo(data, tmp_path):
    from tests.integration.yolo_lab import new_model

    assert main(words(data, tmp_path, name='command')) == 0
    plain = train(new_model('yolo11n.yaml'), data, tmp_path, 'plain')
    command = tmp_path / 'command'
    assert weights_hash(command / 'weights/last.pt') == weights_hash(plain / 'weights/last.pt')
    assert set(results(command)) == set(results(plain)) and not (command / 'kd.yaml').exists()


def test_recipe_of_the_repository(data, teacher, tmp_path):
    recipe = REPO / 'configs/yolo/logit_l2.yaml'
    assert main([*words(data, tmp_path), f'kd={recipe}', f'kd_teacher={teacher}', 'kd_box=0']) == 0
    found = results(tmp_path / 'run')
    assert found[KD[0]][0] > 0 and KD[1] not in found
    assert 'type: YOLOLogitLoss' in (tmp_path / 'run/kd.yaml').read_text()


def test_several_data_sets(data, teacher, tmp_path):
    """Ultralytics then trains one model after the other, and some kinds of callbacks are lost."""
    other = write_data(tmp_path / 'other', seed=1)
    given = [w for w in words(data, tmp_path / 'sweep') if not w.startswith(('data=', 'name='))]
    assert main([*given, f'data={[data, other]}', f'kd_teacher={teacher}']) == 0
    runs = sorted((tmp_path / 'sweep').rglob('results.csv'))
    assert len(runs) == 2 and all(results(r.parent)[KD[0]][0] > 0 for r in runs)


def test_the_command_is_installed():
    (command,) = metadata.entry_points(group='console_scripts', name='yolo-kd')
    assert command.load() is main


@pytest.mark.slow
@pytest.mark.parametrize('form', [pytest.param('yolo-kd', marks=pytest.mark.long), 'environment'])
def test_two_processes(tmp_path, monkeypatch, form):
    """Ultralytics' worker script gets the callback from the defaults; it starts in another folder."""
    pytest.importorskip('cloudpickle')
    from ultralytics.utils.callbacks import default_callbacks

    from kd_plugins.yolo import DistillCallback
    from tests.integration.test_yolo_ddp import launch

    data = write_data(tmp_path / 'data')
    monkeypatch.chdir(tmp_path)
    os.mkdir('teachers')
    teacher = save_teacher(tmp_path / 'teachers/teacher.pt', 'yolo26s.yaml')
    if form == 'yolo-kd':
        monkeypatch.chdir('teachers')
        with by_default(DistillCallback('teacher.pt')):
            folder, ranks, _, done = launch(tmp_path, data, 'kd', None)
    else:
        Path('kd.yaml').write_text(f'teacher: {teacher}\n')
        callback = autoload.RecipeCallback(str(tmp_path / 'kd.yaml'))
        for event in autoload.EVENTS:
            monkeypatch.setitem(default_callbacks, event, [*default_callbacks[event], getattr(callback, event)])
        folder, ranks, _, done = launch(tmp_path, data, 'kd', None)
    assert all(r['criterion'] == 'KDCriterion' for r in ranks) and ranks[0]['parameters'] == ranks[1]['parameters']
    assert f'teacher: {teacher}' in (folder / 'kd.yaml').read_text()
    assert (done.stdout + done.stderr).count('Knowledge distillation is ON') == 1


# ---------------------------------------------------------------------- the unmodified yolo
@pytest.fixture(scope='module')
def python(tmp_path_factory):
    """The interpreter of a fresh environment with our packages, where ``yolo-kd enable`` may write."""
    folder = tmp_path_factory.mktemp('environment')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(folder)], check=True)
    (packages,) = folder.glob('lib/python*/site-packages')
    here = Path(sys.modules['ultralytics'].__file__).parents[1]
    (packages / 'parent.pth').write_text(f'{here}\n{REPO}\n')
    return str(folder / 'bin' / 'python')


@pytest.mark.slow
def test_unmodified_yolo(data, teacher, tmp_path, python):
    """Merely installed it does nothing, whatever the variable says. Enabled, it distils from a recipe that it names.

    That an enabled environment does nothing without the variable is in the unit tests: not even an import.
    """
    (tmp_path / 'kd.yaml').write_text('teacher: teacher.pt\ncls: 1.0\n')
    os.symlink(teacher, tmp_path / 'teacher.pt')

    def yolo(name):
        given = words(data, tmp_path, name=name)
        done = run(YOLO, *given, cwd=tmp_path, python=python, **{VARIABLE: 'kd.yaml'})
        assert done.returncode == 0, done.stderr[-2000:]
        return tmp_path / name

    assert main(words(data, tmp_path, name='plain')) == 0
    installed = yolo('installed')
    assert weights_hash(installed / 'weights/last.pt') == weights_hash(tmp_path / 'plain/weights/last.pt')
    assert not set(KD) & set(results(installed)) and not (installed / 'kd.yaml').exists()
    done = run(YOLO_KD, 'enable', cwd=tmp_path, python=python)
    assert done.returncode == 0 and 'Enabled by' in done.stdout, done.stderr
    distilled = yolo('distilled')
    assert all(results(distilled)[k][0] > 0 for k in KD)
    assert f'teacher: {tmp_path / "teacher.pt"}' in (distilled / 'kd.yaml').read_text()


def test_an_explicit_callback_wins_over_the_variable(data, teacher, tmp_path, monkeypatch, caplog):
    from ultralytics.utils.callbacks import default_callbacks

    callback = autoload.RecipeCallback(str(tmp_path / 'missing.yaml'))
    for event in autoload.EVENTS:
        monkeypatch.setitem(default_callbacks, event, [*default_callbacks[event], getattr(callback, event)])
    assert main([*words(data, tmp_path), f'kd_teacher={teacher}', 'kd_box=0']) == 0
    assert 'KD_PLUGINS_YOLO is ignored' in caplog.text and KD[1] not in results(tmp_path / 'run')


# ---------------------------------------------------------------------- bad input
# Words, and a part of the sentence. `T` is a folder with teachers, recipes, and an earlier run.
BAD = {
    'no teacher': (['kd_cls=1'], 'kd_teacher is missing'),
    'missing teacher': (['kd_teacher=T/techer.pt'], "does not exist; .*did you mean 'teacher.pt'"),
    'teacher is a yaml': (['kd_teacher=yolo11x.yaml'], 'is not a .pt file; a .yaml has no trained weights'),
    'damaged teacher': (['kd_teacher=T/damaged.pt'], r'damaged\.pt.*cannot be loaded'),
    'teacher of another task': (['kd_teacher=T/classifier.pt'], 'student is a detector and the teacher a classifier'),
    'not a number': (['kd_teacher=T/teacher.pt', 'kd_cls=abc'], "kd_cls must be a number or a schedule, got 'abc'"),
    'negative weight': (['kd_teacher=T/teacher.pt', 'kd_box=-1'], 'kd_box must be a finite number >= 0, got -1'),
    'NaN': (['kd_teacher=T/teacher.pt', 'kd_cls=nan'], "kd_cls must be a number.*'nan'"),
    'NaN in a recipe': (['kd=T/nan.yaml'], 'cls must be a finite number >= 0, got nan'),
    'temperature 0': (['kd_teacher=T/teacher.pt', 'kd_temperature=0'], 'kd_temperature must be a finite number > 0'),
    'objectness': (['kd_teacher=T/teacher.pt', 'kd_obj=1'], 'kd_obj must stay 0.*no objectness'),
    'unknown option': (['kd_teacher=T/teacher.pt', 'kd_tempreature=2'], "did you mean 'kd_temperature'"),
    'unknown loss': (['kd_teacher=T/teacher.pt', 'kd_cls_loss=bec'], "kd_cls_loss has no choice 'bec'.*'bce'"),
    'unknown loss type': (['kd_teacher=T/teacher.pt', 'kd_box_loss=dict(type="BoxIoU")'], "did you mean 'BoxIoULoss'"),
    'half a value': (['kd_teacher=T/teacher.pt', 'kd_class_map={red:'], 'cannot be read: .*in quotes'),
    'no value': (['kd_teacher=T/teacher.pt', 'kd_cls'], 'kd_cls needs a value'),
    'not training': (['kd_teacher=T/teacher.pt', 'mode=val'], "the mode is 'val'"),
    'missing recipe': (['kd=T/na.yaml'], "does not exist; .*did you mean 'nan.yaml'"),
    'recipe with an unknown key': (['kd=T/key.yaml'], "has no option 'teachr': did you mean 'teacher'"),
    'recipe is not YAML': (['kd=T/broken.yaml'], 'is not valid YAML'),
    'resume without kd.yaml': (['resume', 'model=T/earlier/weights/last.pt'], 'has no kd.yaml'),
    'resume of nothing': (['resume', 'model=T/none.pt'], "resume needs the checkpoint, and '.*none.pt' does not exist"),
    'disjoint classes': (['kd_teacher=T/animals.pt'], 'no class in common.*class_map='),
    'equal count, other names': (['kd_teacher=T/colours.pt', 'kd_classes=[rot, gruen, blau]'], 'no class in common'),
    'class_map': (['kd_teacher=T/teacher.pt', 'kd_class_map={rde: red}'], "no class 'rde'; did you mean 'red'"),
    'start after the end': (['kd_teacher=T/teacher.pt', 'kd_start=1'], 'start=1 is not before the end'),
    'stop before start': (['kd_teacher=T/teacher.pt', 'kd_start=1', 'kd_stop=1'], 'must come after start'),
    'unknown head': (['kd_teacher=T/teacher.pt', 'model=yolov8n-rtdetr.yaml'], 'head RTDETRDecoder.*supported are'),
    'no bins': (['kd_teacher=T/teacher.pt', 'model=yolo26n.yaml', 'kd_box_loss=ld'], 'does not .*reg_max=1'),
    'branch of another head': (['kd_teacher=T/teacher.pt', 'kd_branch=both'], 'the student is not end-to-end'),
    'too old': (['kd_teacher=T/teacher.pt'], r'ultralytics 8\.3\.0 is too old'),
}


@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    """Everything the table names."""
    folder = tmp_path_factory.mktemp('shelf')
    for name, cfg in (('teacher', 'yolov8n.yaml'), ('colours', 'yolov8n.yaml'), ('same', 'yolo11n.yaml')):
        save_teacher(folder / f'{name}.pt', cfg)
    save_teacher(folder / 'animals.pt', 'yolov8n.yaml', names=('cat', 'dog', 'cow'))
    save_teacher(folder / 'classifier.pt', 'yolov8n-cls.yaml')
    (folder / 'damaged.pt').write_bytes((folder / 'teacher.pt').read_bytes()[:1000])
    (folder / 'nan.yaml').write_text(f'teacher: {folder}/teacher.pt\ncls: .nan\n')
    (folder / 'key.yaml').write_text('teachr: teacher.pt\n')
    (folder / 'broken.yaml').write_text('cls: [1\n')
    (folder / 'earlier/weights').mkdir(parents=True)
    save_teacher(folder / 'earlier/weights/last.pt', 'yolo11n.yaml')
    (folder / 'earlier/results.csv').write_text('epoch\n1\n')
    return folder


def snapshot(*folders):
    return {
        str(f): hashlib.sha256(f.read_bytes()).hexdigest()
        for folder in folders
        for f in sorted(Path(folder).rglob('*'))
        if f.is_file() and f.suffix != '.cache'
    }


@pytest.mark.parametrize('name', BAD)
def test_bad_input(name, shelf, data, tmp_path, monkeypatch, capsys):
    """One sentence, before training, and every file of the user is still what it was."""
    import ultralytics
    from ultralytics.utils.callbacks import default_callbacks

    added, message = BAD[name]
    if name == 'too old':
        monkeypatch.setattr(ultralytics, '__version__', '8.3.0')
    before, callbacks = snapshot(shelf, Path(data).parent), {k: list(v) for k, v in default_callbacks.items()}
    added = [w.replace('T/', f'{shelf}/') for w in added]
    assert main([*words(data, tmp_path), *added]) == 2
    error = capsys.readouterr().err.splitlines()
    said = [line for line in error if line.startswith('yolo-kd: ')]
    assert len(said) == 1 and said[0] == error[-1], error
    assert re.search(message, said[0]), said[0]
    assert snapshot(shelf, Path(data).parent) == before and default_callbacks == callbacks
    assert not list(tmp_path.rglob('*.pt')) and not list(tmp_path.rglob('results.csv'))
