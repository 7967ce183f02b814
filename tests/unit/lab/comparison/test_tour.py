"""Several comparisons as one, and which of them the demo's command runs."""

import io
import json
import sys
from pathlib import Path

import pytest

from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison import demo
from kd_plugins.lab.comparison.experiment import PLAIN, TEACHER, Experiment, compare, compare_all
from kd_plugins.lab.comparison.history import History
from kd_plugins.lab.comparison.phases import Display, Phase, Progress
from kd_plugins.lab.comparison.table import BOXES

ACCURACY = {TEACHER: 0.5, PLAIN: 0.2, 'mine': 0.3}


class Silent(Progress):
    def update(self, line, mode, max_epochs):
        return False


class Fake(Experiment):
    """Every phase is a process that notes that it ran."""

    metrics, unit, step, note, together, title = BOXES, 'epoch', 'epoch', 'a note', 'validation', 'Fake'
    distilled, trains_teacher = ['mine'], True

    def __init__(self, work_dir, order, plain_first=False, seeds=(0,), lift=0.0):
        self.work_dir, self.order, self.plain_first, self.seeds, self.jobs = work_dir, order, plain_first, seeds, 2
        self.lift = lift
        self.prepare()
        self.cores = 4

    def phase(self, title, folder, mode='train', threads=2):
        code = f"open({str(self.order)!r}, 'a').write({f'{self.work_dir.name} {title}'!r} + chr(10))"
        code += f"; open({str(folder / 'last')!r}, 'w').write('x')"
        return Phase(title, folder, [sys.executable, '-c', code], {}, Silent(), mode=mode, threads=threads)

    def train_teacher(self):
        return self.phase(TEACHER, self.work_dir / TEACHER / 'train', threads=4)

    def train_student(self, arm, seed):
        assert arm == PLAIN or self.teacher_weights().is_file()
        return self.phase(arm, self.work_dir / f'seed{seed}' / arm / 'train')

    def teacher_weights(self):
        return self.work_dir / TEACHER / 'train' / 'last'

    def last_checkpoint(self, folder):
        return folder / 'last'

    def test(self, title, folder, checkpoint):
        return self.phase(f'test {title}', folder / 'test', 'test')

    def history(self, folder):
        return History()

    def measured(self, test):
        accuracy = ACCURACY[test.folder.parent.name]
        return accuracy + self.lift, 2 * accuracy

    def parameters(self, arm, test):
        return 2000 if arm == TEACHER else 1000

    def size(self, checkpoint, test):
        return checkpoint.stat().st_size

    def picture(self, tests):
        return None

    def metric(self, histories):
        return 'map'

    def facts(self):
        return dict(data=self.work_dir.name)


@pytest.fixture
def two(tmp_path):
    order = tmp_path / 'order.txt'
    return order, {'A: x': Fake(tmp_path / 'a', order), 'B: y': Fake(tmp_path / 'b', order, True, lift=0.1)}


def test_one_table_and_one_report_of_two(two, tmp_path):
    order, experiments = two
    stream = io.StringIO()
    results = compare_all(experiments, tmp_path / 'all', 'Two of them', Display(stream))
    steps = order.read_text().splitlines()
    assert len(steps) == len(set(steps)) == 12
    # Those that wait for nothing first, then those that need a teacher beside evaluations of the first, then theirs.
    assert set(steps[:3]) == {'a teacher', 'b teacher', 'b plain'}
    taught = {'a plain', 'a mine', 'b mine'}
    assert set(steps[3:9]) == taught | {'a test teacher', 'b test teacher', 'b test plain, seed 0'}
    assert set(steps[9:]) == {f'{one} test {arm}, seed 0' for one, arm in map(str.split, taught)}
    printed = stream.getvalue()
    assert printed.count('parameters') == 1 and 's/epoch' not in printed and 'nan' not in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ['A:', 'x', 'teacher', '2.0', 'k', '50.0', 'mAP'] in lines
    assert ['B:', 'y', 'teacher', '2.0', 'k', '60.0', 'mAP'] in lines
    assert lines.count(['distilled:', 'mine', '1.0', 'k', '30.0', 'mAP', '+10.0']) == 1
    assert 'B: y, distilled: mine: +10.0 mAP on one seed' in printed
    page = (tmp_path / 'all' / 'report.html').read_text()
    assert page.count('<table>') == 3 and page.index('<table>') < page.index('<h2>A: x</h2>') < page.index('<h2>B: y')
    for picture in ('a_x_curves.png', 'b_y_curves.png'):
        assert f'src="{picture}"' in page and (tmp_path / 'all' / picture).stat().st_size > 1000
    assert f'checkpoint of mine, seed 0</dt><dd>{tmp_path}/a/seed0/mine/train/last' in page
    stored = json.loads((tmp_path / 'all' / 'results.json').read_text())
    assert stored.keys() == results.keys() and list(stored['arms']) == ['A: x', 'B: y']
    assert stored['arms']['B: y']['distilled: mine']['runs'][0]['map'] == pytest.approx(0.4)


def test_teachers_that_train_side_by_side_share_the_cores(two, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(
        'kd_plugins.lab.comparison.experiment.run_phases',
        lambda phases, *rest: seen.update({(p.folder.parents[1].name, p.title): p.threads for p in phases}),
    )
    _, experiments = two
    for experiment in experiments.values():
        path = experiment.teacher_weights()
        path.parent.mkdir(parents=True)
        path.write_text('x')
    with pytest.raises(FileNotFoundError):
        compare_all(experiments, tmp_path / 'all', 'Two', Display(io.StringIO()))
    assert seen['a', TEACHER] == seen['b', TEACHER] == 2
    seen.clear()
    with pytest.raises(FileNotFoundError):
        compare(experiments['A: x'], Display(io.StringIO()))
    assert seen['a', TEACHER] == 4


def test_which_parts_the_command_runs(monkeypatch, tmp_path, capsys):
    ran = []

    class Package:
        @staticmethod
        def demo(folder, **options):
            ran.append((Path(folder).relative_to(tmp_path).as_posix(), options.get('part')))

    monkeypatch.setattr(demo, 'import_module', lambda name: Package)
    monkeypatch.setattr(demo, 'tour', lambda folder, **options: ran.append(('tour', list(options['seeds']))))
    demo.main(['--work-dir', str(tmp_path), '--seeds', '2'])
    assert ran == [('tour', [0, 1])]
    ran.clear()
    demo.main(['--work-dir', str(tmp_path), '--all'])
    assert [folder for folder, _ in ran] == [folder for *_, folder in demo.ZOOS.values()]
    ran.clear()
    demo.main(['--work-dir', str(tmp_path), '--zoo', 'cls', 'yolo'])
    assert ran == [('cls', 'classification'), ('yolo', None)]
    for words in (['--kd', 'cwd'], ['--all', '--kd', 'cwd'], ['--zoo', 'seg', 'cls', '--kd', 'cwd']):
        with pytest.raises(SystemExit):
            demo.main(words)
        assert '--kd needs --zoo' in capsys.readouterr().err


def test_the_tour_goes_on_without_a_framework(monkeypatch, tmp_path, capsys):
    seen = []

    class Package:
        @staticmethod
        def planned(folder, **options):
            return folder, options

    monkeypatch.setattr(demo, 'import_module', lambda name: Package)
    monkeypatch.setattr(demo, 'compare_all', lambda experiments, folder, title: seen.append(experiments))
    monkeypatch.setattr(demo, 'find_spec', lambda name: object())
    demo.tour(tmp_path, seeds=[0])
    assert list(seen[0]) == ['Ultralytics: YOLO11'] and seen[0]['Ultralytics: YOLO11'][1]['short']
    printed = capsys.readouterr().out
    assert 'left out' not in printed and 'with your own data' in printed
    monkeypatch.setattr(demo, 'find_spec', lambda name: None if name == 'ultralytics' else object())
    demo.tour(tmp_path, seeds=[0])
    assert list(seen[1]) == ['timm: DeiT, taught by a ResNet']
    assert 'Ultralytics: YOLO11 is left out: ultralytics is not installed' in capsys.readouterr().out
    monkeypatch.setattr(demo, 'find_spec', lambda name: None)
    with pytest.raises(DistillError, match='the demo needs ultralytics or timm'):
        demo.tour(tmp_path)
