"""With torch and nothing else installed: every door says in one sentence what is missing, and what installs it."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kd_plugins

CHECKOUT = Path(kd_plugins.__file__).parent
NEEDED = ('torch', 'numpy', 'pyyaml')


def closure(names):
    """Distributions that these need, themselves included."""
    found, left = {}, list(names)
    while left:
        name = left.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if distribution.metadata['Name'] in found:
            continue
        found[distribution.metadata['Name']] = distribution
        needs = map(Requirement, distribution.requires or ())
        left += [need.name for need in needs if need.marker is None or need.marker.evaluate({'extra': ''})]
    return found.values()


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    """A folder of packages with links to torch, what it needs, and this package."""
    folder = tmp_path_factory.mktemp('site')
    for distribution in [*closure(NEEDED), metadata.distribution('kd-plugins')]:
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ('..', '__pycache__') and not top.endswith(('.pth', '_finder.py')):
                link, target = folder / top, Path(distribution.locate_file(top))
                if not link.exists() and target.exists():
                    link.symlink_to(target)
    if not (folder / 'kd_plugins').exists():
        (folder / 'kd_plugins').symlink_to(CHECKOUT)
    return folder


@pytest.fixture
def run(bare, tmp_path, monkeypatch):
    """Run Python with those only; returns the exit status and the last line of its errors."""
    monkeypatch.setenv('PYTHONPATH', str(bare))

    def call(*words):
        done = subprocess.run([sys.executable, '-S', *words], cwd=tmp_path, capture_output=True, text=True)
        call.errors = done.stderr
        return done.returncode, (done.stderr.strip().splitlines() or [''])[-1]

    return call


MM = 'kd_plugins.mm needs MMEngine, which is not installed; install '
ULTRALYTICS = 'Ultralytics is not installed; pip install '


@pytest.mark.parametrize(
    ('code', 'sentence'),
    [
        ('import kd_plugins.mm', f'ModuleNotFoundError: {MM}'),
        ("import kd_plugins.yolo as y; y.DistillCallback('x.pt')", f'kd_plugins.errors.DistillError: {ULTRALYTICS}'),
        (
            "from kd_plugins.teachers.sources import find_source; find_source(dict(timm='resnet18'))",
            "kd_plugins.errors.DistillError: teacher.timm needs 'timm', which is not installed; pip install ",
        ),
    ],
)
def test_imports(run, code, sentence):
    status, last = run('-c', code)
    assert status == 1 and last.startswith(sentence) and len(last) < 400
    assert 'During handling' not in run.errors and 'kd-plugins[' not in last


@pytest.mark.parametrize(
    ('words', 'sentence'),
    [
        ('yolo.cli train model=yolo11n.yaml kd_teacher=x.pt', f'yolo-kd: {ULTRALYTICS}'),
        ('yolo.cli predict model=yolo11n.pt', f'yolo-kd: {ULTRALYTICS}'),
        ('cli train x.py', 'error: kd-plugins train needs mmengine, which is not installed; kd-plugins info '),
        ('cli demo --zoo yolo', 'error: kd-plugins demo needs '),
        ('cli benchmark --zoo yolo', 'error: kd-plugins benchmark needs '),
        ('mm.cli train x.py', MM),
    ],
)
def test_commands(run, words, sentence):
    module, *rest = words.split()
    status, last = run('-m', f'kd_plugins.{module}', *rest)
    if module == 'mm.cli':
        assert status and sentence in last
    else:
        assert status in (1, 2) and last.startswith(sentence)
        assert run.errors.count('\n') == 1, run.errors


def test_what_needs_no_framework_works(run):
    assert run('-c', 'import kd_plugins.losses, kd_plugins.adapters, kd_plugins.yolo') == (0, '')
    for words in (['recipes'], ['info'], ['--version']):
        assert run('-m', 'kd_plugins', *words) == (0, '')
