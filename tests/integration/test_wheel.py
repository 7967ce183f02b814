"""The wheel, installed beside the frameworks: every file in it, every command from an empty folder, every zoo."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What a build reads.
SOURCES = ('kd_plugins', 'configs', 'tools', 'setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """Folder with what pip installs of the wheel that pip builds; the checkout is left as it is."""
    root = tmp_path_factory.mktemp('wheel')
    for name in SOURCES:
        if (ROOT / name).is_dir():
            copied = shutil.copytree(ROOT / name, root / 'source' / name, symlinks=True,
                                     ignore=shutil.ignore_patterns('__pycache__'))  # fmt: skip
        else:
            copied = shutil.copy(ROOT / name, root / 'source')
        assert Path(copied).exists()
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', root / 'dist', '.'],
                   cwd=root / 'source', check=True)  # fmt: skip
    (wheel,) = (root / 'dist').iterdir()
    subprocess.run([*pip, 'install', '--no-deps', '--target', root / 'site', wheel], check=True)
    shutil.rmtree(root / 'source')
    return root / 'site'


@pytest.fixture
def run(site, tmp_path, monkeypatch):
    """Run Python, or a console script, from an empty folder with the wheel in the place of the checkout."""
    monkeypatch.setenv('PYTHONPATH', str(site))
    monkeypatch.delenv('DIGITS_ROOT', raising=False)
    folder = tmp_path / 'empty'
    folder.mkdir()

    def call(*words):
        done = subprocess.run([str(w) for w in words], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    call.folder = folder
    return call


def files(folder):
    """Relative paths of what a build must not forget."""
    found = (p for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts)
    return {p.relative_to(folder).as_posix() for p in found}


def test_nothing_is_left_out(site):
    package = site / 'kd_plugins'
    assert {f for f in files(ROOT / 'kd_plugins') if not f.startswith('.mim')} <= files(package)
    assert files(package / '.mim' / 'configs') == files(ROOT / 'configs')
    assert files(package / '.mim' / 'tools') == files(ROOT / 'tools') - {'install.py', 'draw_results.py'}
    assert not [p for p in site.rglob('*') if p.is_symlink()]


def test_console_scripts(run, site):
    scripts = site / 'bin'
    assert run(scripts / 'kd-plugins', '--version') == run(sys.executable, '-m', 'kd_plugins', '--version')
    assert 'kd_plugins' in run(scripts / 'yolo-kd', '--version')
    assert 'pixel_kl' in run(scripts / 'kd-plugins', 'recipes')
    # A folder of the user's that is called like one of ours is not looked into.
    (run.folder / 'configs' / 'kd').mkdir(parents=True)
    (run.folder / 'configs' / 'kd' / 'cwd.yaml').write_text('wrong: 1')
    (run.folder / 'cwd.yaml').write_text('wrong: 1')
    assert run(scripts / 'kd-plugins', 'recipes', 'cwd') == (ROOT / 'kd_plugins' / 'recipes' / 'cwd.yaml').read_text()
    assert 'until: 0.7' in run(scripts / 'kd-plugins', 'recipes', 'kd_plugins::yolo/early.yaml')


PREPARE = """
import os, sys, torch, kd_plugins
from kd_plugins.cli import main
assert kd_plugins.__file__.startswith(os.environ['PYTHONPATH']), kd_plugins.__file__
main(['prepare-digits', '--train', '8', '--val', '4', '--size', '64'])
"""
MMENGINE = (
    PREPARE
    + """
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
folder, teacher, student, kd = sys.argv[1:]
config = Config.fromfile(kd_plugins.config(f'kd_plugins::{folder}/{teacher}'))
init_default_scope(config.default_scope)
import kd_plugins.mm
model = MODELS.build(config.model)
model.init_weights()
torch.save(dict(state_dict=model.state_dict(), meta={}), 'teacher.pth')
open('mine.py', 'w').write(f'''
_base_ = __import__('kd_plugins').config('kd_plugins::{folder}/{student}')
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=1, val_interval=10)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
param_scheduler = []
''')
main(['train', 'mine.py', '--kd', kd, '--teacher', f'kd_plugins::{folder}/{teacher}', '--teacher-checkpoint',
      'teacher.pth', '--work-dir', 'run', '--cfg-options', 'default_hooks.logger.interval=1'])
"""
)
YOLO = (
    PREPARE
    + """
import yaml
from ultralytics import YOLO
model = YOLO('yolo11n.yaml').model.yaml
model = dict({k: v for k, v in model.items() if k in ('backbone', 'head')}, nc=10, scales=dict(n=[0.3, 0.1, 128]))
yaml.safe_dump(model, open('yolo11n-small.yaml', 'w'))
teacher = YOLO('yolo11n-small.yaml', task='detect')
teacher.model.names = {i: str(i) for i in range(10)}
teacher.save('teacher.pt')
from kd_plugins.yolo.cli import main as yolo_kd
assert not yolo_kd(['train', 'model=yolo11n-small.yaml', 'data=data/digits/digits.yaml', 'epochs=1', 'imgsz=64',
    'batch=4', 'workers=0', 'device=cpu', 'plots=False', f'project={os.getcwd()}', 'name=run',
    'kd=kd_plugins::yolo/logit_l2.yaml', 'kd_teacher=teacher.pt'])
"""
)


@pytest.mark.parametrize(
    'words',
    [
        pytest.param(('det', 'digits_yolox_teacher', 'digits_yolox_student', 'yolo_logit'), marks=pytest.mark.long),
        pytest.param(('seg', 'digits_fpn_teacher', 'digits_fpn_student', 'cwd'), marks=pytest.mark.long),
        ('cls', 'digits_resnet_teacher', 'digits_resnet_student', 'kl'),
    ],
    ids=['mmdet', 'mmseg', 'timm'],
)
def test_mmengine_distils_from_an_empty_folder(run, words):
    run(sys.executable, '-W', 'ignore', '-c', MMENGINE, *words)
    (log,) = run.folder.glob('run/*/*.log')
    assert 'loss_kd' in log.read_text()


def test_ultralytics_distils_from_an_empty_folder(run):
    run(sys.executable, '-c', YOLO)
    assert 'train/kd' in (run.folder / 'run' / 'results.csv').read_text()
    assert (run.folder / 'run' / 'kd.yaml').is_file()
