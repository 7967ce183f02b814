"""What cannot be compared is refused before anything is written."""

import json
import math

import pytest
from PIL import Image

pytest.importorskip('ultralytics')

from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison.yolo import Comparison
from kd_plugins.lab.comparison.yolo.demo import write_student
from kd_plugins.lab.comparison.yolo.evaluate import read_labels
from kd_plugins.lab.comparison.yolo.tasks import TASKS, image_files


@pytest.fixture
def wanted(tmp_path):
    for kind in ('images', 'labels'):
        (tmp_path / kind).mkdir()
    Image.new('RGB', (32, 32)).save(tmp_path / 'images' / '0.png')
    (tmp_path / 'labels' / '0.txt').write_text('0 0.5 0.5 0.5 0.5\n')
    (tmp_path / 'data.yaml').write_text(f'path: {tmp_path}\ntrain: images\nval: images\nnames: [x]\n')
    return dict(
        teacher='yolo11n.yaml',
        student='yolo11n.yaml',
        data=str(tmp_path / 'data.yaml'),
        recipes=['native', 'logit_l2'],
        work_dir=tmp_path / 'runs',
    )


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(teacher='none.pt'), "teacher 'none.pt' does not exist"),
        (dict(student='yolo11q.yaml'), '--student'),
        (dict(student='yolo11n-seg.yaml'), '--teacher is a detect model and --student a segment model'),
        (dict(recipes=['kl']), "'kl' is for classification, not for detection"),
        (dict(recipes=['native'], recipe_options=[['weight=3']]), r"native is Ultralytics' own distill_model=.*dis=3"),
        (
            dict(recipes=['default'], recipe_options=[['weight=3']]),
            "default is no recipe and has no 'weight'; write e.g",
        ),
        (dict(data='none.yaml'), "--data 'none.yaml' does not exist"),
        (dict(recipes=[]), 'at least one recipe'),
        (dict(recipes=['native', 'native']), 'another name'),
        (dict(recipes=['logit_l3']), "did you mean 'logit_l2'"),
        (dict(seeds=()), '--seeds'),
        (dict(jobs=0), '--jobs'),
        (dict(student_options=['epochs']), 'key=value'),
        (dict(student_options=['seed=3']), "'seed=3' cannot be given"),
        (dict(teacher_options=['kd_cls=3']), "'kd_cls=3' cannot be given"),
    ],
)
def test_refused(wanted, tmp_path, changes, words):
    with pytest.raises(DistillError, match=words):
        Comparison(**{**wanted, **changes})
    assert not (tmp_path / 'runs').exists()


def test_commands(wanted, tmp_path):
    comparison = Comparison(**wanted, student_options=['epochs=7', 'imgsz=96'])
    phase = comparison.train_student('plain', 3)
    assert 'seed=3' in phase.command and 'epochs=7' in phase.command and phase.max_epochs == 7
    assert not any(w.startswith(('kd_teacher', 'kd=', 'distill_model')) for w in phase.command), 'plain means plain'
    assert phase.resume is None
    weights = tmp_path / 'runs' / 'teacher' / 'train' / 'weights'
    weights.mkdir(parents=True)
    (weights / 'last.pt').write_bytes(b'1')
    teacher = str(weights / 'last.pt')
    assert f'distill_model={teacher}' in comparison.train_student('native', 0).command
    words = comparison.train_student('logit_l2', 0).command
    assert f'kd_teacher={teacher}' in words and any(w.endswith('logit_l2.yaml') for w in words)
    assert comparison.train_teacher().resume == ['resume=True', f'model={teacher}'], 'goes on from its last epoch'
    # Another teacher makes another run of the distilled students, not of the plain one.
    prints = {arm: comparison.train_student(arm, 0).fingerprint for arm in ('plain', 'native')}
    (weights / 'last.pt').write_bytes(b'2')
    again = Comparison(**wanted, student_options=['epochs=7', 'imgsz=96'])
    assert again.train_student('plain', 0).fingerprint == prints['plain']
    assert again.train_student('native', 0).fingerprint != prints['native']


def test_every_combination_of_options_is_a_student(wanted, tmp_path):
    sweep = [['weight=1,3', 'stop=5'], ['neck.weight=2']]
    comparison = Comparison(**{**wanted, 'recipes': ['cwd', 'cwd,pkd']}, recipe_options=sweep)
    assert list(comparison.distilled) == [
        f'{recipe} {words}' for recipe in ('cwd', 'cwd+pkd')
        for words in ('weight=1 stop=5', 'weight=3 stop=5', 'neck.weight=2')
    ]  # fmt: skip
    (tmp_path / 'runs' / 'teacher' / 'train' / 'weights').mkdir(parents=True)
    (tmp_path / 'runs' / 'teacher' / 'train' / 'weights' / 'last.pt').write_bytes(b'1')
    phases = [comparison.train_student(arm, 0) for arm in comparison.distilled]
    assert {'kd=cwd,pkd', 'kd_weight=3', 'kd_stop=5'} <= set(phases[4].command)
    assert len({phase.fingerprint for phase in phases}) == 6


def test_options_of_what_is_distilled_by_default(wanted, tmp_path):
    comparison = Comparison(**{**wanted, 'recipes': ['default']}, recipe_options=[['cls=0.5,2', 'temperature=3']])
    assert list(comparison.distilled) == ['default cls=0.5 temperature=3', 'default cls=2 temperature=3']
    (tmp_path / 'runs' / 'teacher' / 'train' / 'weights').mkdir(parents=True)
    (tmp_path / 'runs' / 'teacher' / 'train' / 'weights' / 'last.pt').write_bytes(b'1')
    phases = [comparison.train_student(arm, 0) for arm in comparison.distilled]
    assert {'kd_cls=0.5', 'kd_temperature=3'} <= set(phases[0].command)
    assert phases[0].fingerprint != phases[1].fingerprint


@pytest.mark.parametrize(
    ('task', 'suffix', 'names', 'size'),
    [
        ('segment', '-seg', ('mask mAP', 'mask AP50', 'box mAP'), '640'),
        ('pose', '-pose', ('pose mAP', 'pose AP50', 'box mAP'), '640'),
        ('obb', '-obb', ('mAP', 'AP50'), '640'),
        ('classify', '-cls', ('top-1', 'top-5'), '224'),
    ],
)
def test_other_tasks(wanted, tmp_path, task, suffix, names, size):
    model = f'yolo11n{suffix}.yaml'
    data, recipe = str(tmp_path / 'data.yaml'), 'cwd'
    if task == 'classify':
        data, recipe = str(tmp_path / 'folders'), 'kl'
        for split in ('train', 'val'):
            (tmp_path / 'folders' / split / 'x').mkdir(parents=True)
            Image.new('RGB', (32, 32)).save(tmp_path / 'folders' / split / 'x' / '0.png')
    comparison = Comparison(**{**wanted, 'teacher': model, 'student': model, 'data': data, 'recipes': [recipe]})
    assert comparison.metrics.names == names and names[0] in comparison.note
    (tmp_path / 'x.pt').write_bytes(b'1')
    test = comparison.test('plain', tmp_path / 'runs' / 'seed0' / 'plain', tmp_path / 'x.pt')
    assert test.command[test.command.index('--imgsz') + 1] == size
    values = dict(zip(comparison.task.keys, (0.1, 0.2, 0.3), strict=False))
    test.folder.mkdir(parents=True)
    (test.folder / 'result.json').write_text(json.dumps(dict(metrics=values, parameters=3, size=12, images=[])))
    assert comparison.measured(test) == tuple(values.values()) and comparison.size(tmp_path / 'x.pt', test) == 12
    (test.folder / 'result.json').write_text(json.dumps(dict(metrics={}, parameters=3, size=12, images=[])))
    assert all(math.isnan(value) for value in comparison.measured(test))
    before = comparison.train_student('plain', 0).fingerprint
    for file in tmp_path.rglob('0.png'):
        Image.new('RGB', (64, 64), 'red').save(file)
    (tmp_path / 'labels' / '0.txt').write_text('')
    again = Comparison(**{**wanted, 'teacher': model, 'student': model, 'data': data, 'recipes': [recipe]})
    assert again.train_student('plain', 0).fingerprint != before


def test_the_picture_of_classifiers(tmp_path):
    images = []
    for label, name in enumerate(('cat', 'dog')):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new('RGB', (8, 8)).save(tmp_path / name / f'{i}.png')
            images.append(dict(file=str(tmp_path / name / f'{i}.png'), truth=label, found=label, probability=0.9))
    wrong = [*images[:3], {**images[3], 'found': 0}]
    results = {model: dict(names=['cat', 'dog'], images=i) for model, i in (('plain', images), ('mine', wrong))}
    picture = TASKS['classify'].picture(results, 1)
    assert [len(group) for group in picture.groups.values()] == [1, 2] and 'dog/1.png' in picture.images
    assert picture.found['mine']['dog/1.png'].label == 0 and picture.truth['dog/1.png'] == 1
    picture.draw(tmp_path / 'picture.png')
    results['mine']['images'] = wrong[:3]
    assert TASKS['classify'].picture(results, 1) is None


def test_other_labels_make_another_run(wanted, tmp_path):
    before = Comparison(**wanted).train_student('plain', 0).fingerprint
    assert Comparison(**wanted).train_student('plain', 0).fingerprint == before
    (tmp_path / 'labels' / '0.txt').write_text('')
    assert Comparison(**wanted).train_student('plain', 0).fingerprint != before
    (tmp_path / 'images' / '0.png').unlink()
    (tmp_path / 'images').rmdir()
    with pytest.raises(DistillError, match=r'--data .* cannot be used'):
        Comparison(**wanted).train_student('plain', 0)


def test_a_given_teacher_is_evaluated_as_it_teaches(wanted, tmp_path):
    (tmp_path / 'x.pt').write_bytes(b'1')
    for options, size in (([], '96'), (['imgsz=128'], '128')):
        comparison = Comparison(**wanted, student_options=['imgsz=96'], teacher_options=options)
        for title, expected in (('teacher', size), ('plain', '96')):
            command = comparison.test(title, tmp_path / 'runs', tmp_path / 'x.pt').command
            assert command[command.index('--imgsz') + 1] == expected


def test_labels_and_files(tmp_path):
    (tmp_path / 'a.txt').write_text('2 0.5 0.5 0.5 0.25\n\n')
    assert read_labels(tmp_path / 'a.txt', 100, 200) == [[50.0, 37.5, 150.0, 62.5, 2.0]]
    assert read_labels(tmp_path / 'none.txt', 100, 200) == []
    (tmp_path / 'outline.txt').write_text('1 0.25 0.5 0.5 0.25 0.75 0.5\n')
    assert read_labels(tmp_path / 'outline.txt', 100, 200) == [[50.0, 25.0, 150.0, 50.0, 1.0]]
    (tmp_path / 'points.txt').write_text('1 0.5 0.5 0.5 0.25 0.1 0.1 2 0.9 0.9 2\n')
    assert read_labels(tmp_path / 'points.txt', 100, 200, keypoints=True) == [[50.0, 37.5, 150.0, 62.5, 1.0]]
    for i in range(10):
        Image.new('RGB', (8, 8)).save(tmp_path / f'{i}.png')
    files = image_files(str(tmp_path))
    assert [p[-5:] for p in files] == [f'{i}.png' for i in range(10)]
    (tmp_path / 'val.txt').write_text('./1.png\n./0.png\n')
    assert image_files([str(tmp_path / 'val.txt')]) == [str(tmp_path / '0.png'), str(tmp_path / '1.png')]


def test_narrow_student_is_smaller_than_n(tmp_path):
    from ultralytics import YOLO

    sizes = [
        sum(p.numel() for p in YOLO(cfg, verbose=False).model.parameters())
        for cfg in (write_student(tmp_path / 'runs' / 'narrow.yaml'), 'yolo11n.yaml')
    ]
    assert sizes[0] < sizes[1] / 2
