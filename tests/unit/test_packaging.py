"""What users rely on when they install: metadata, a light import, and a base install that changes nothing of theirs."""

import configparser
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Packages that mypy checks strictly.
STRICT = ('adapters', 'distiller', 'errors', 'losses', 'predictions', 'recipes', 'teachers')
FRAMEWORKS = ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'ultralytics', 'timm', 'cv2')


@pytest.fixture(scope='module')
def requirements():
    """Requirement names by extra ('' is the base install), as pip sees them in the built metadata."""
    names = {}
    for line in metadata.requires('kd-plugins'):
        name = re.match(r'[\w.-]+', line).group().lower()
        extra = re.search(r'extra == [\'"](\w+)', line)
        names.setdefault(extra.group(1) if extra else '', set()).add(name)
    return names


def python(*arguments, **environment):
    """Output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_base_install_requires_no_framework(requirements):
    assert requirements[''] == {'torch', 'numpy', 'pyyaml'}


def test_base_install_never_lowers_torch():
    (torch,) = (line for line in metadata.requires('kd-plugins') if re.match(r'torch\b', line) and 'extra' not in line)
    assert '<' not in torch and '==' not in torch


def test_extras(requirements):
    assert requirements['mm'] >= {'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'}
    assert requirements['yolo'] == {'ultralytics'}
    assert requirements['timm'] == {'timm', 'torchvision', 'safetensors'}
    assert requirements['export'] == {'onnx', 'onnxruntime'}
    assert requirements['dev'] >= {'mypy', 'pytest', 'ruff'}
    extras = {'mm', 'yolo', 'timm', 'mmpretrain', 'mmrotate', 'export', 'demo', 'docs', 'dev', 'all'}
    assert extras == set(metadata.metadata('kd-plugins').get_all('Provides-Extra'))


def test_metadata():
    about = metadata.metadata('kd-plugins')
    assert about['License'] == 'Apache-2.0'
    assert set(about['Requires-Python'].split(',')) == {'>=3.10', '<3.14'}
    assert 'Version 2.0, January 2004' in (ROOT / 'LICENSE').read_text()


def test_base_install_changes_no_framework(tmp_path):
    """pip itself, offline and as a dry run in this environment: only kd-plugins would be installed."""
    report = tmp_path / 'report.json'
    python(
        '-m',
        'pip',
        'install',
        '--dry-run',
        '--no-build-isolation',
        '--report',
        str(report),
        '-e',
        '.',
        PIP_NO_INDEX='1',
        PIP_USER='0',
        PIP_CONFIG_FILE=os.devnull,
    )
    assert [item['metadata']['name'] for item in json.loads(report.read_text())['install']] == ['kd-plugins']


def test_import_loads_no_framework():
    loaded = python('-c', 'import sys, kd_plugins; print(*sys.modules)').split()
    assert 'kd_plugins' in loaded
    assert not {name.partition('.')[0] for name in loaded} & set(FRAMEWORKS)


def test_version_is_the_packages():
    import kd_plugins

    assert metadata.version('kd-plugins') == kd_plugins.__version__


def test_constraints_fit_the_extras():
    """Every pinned version is one that the metadata allows, so `make` and `pip install .[all]` agree."""
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / 'constraints.txt').read_text().splitlines():
        if '==' in line and not line.startswith('#'):
            pin = Requirement(line)
            if pin.marker is not None and not pin.marker.evaluate():
                continue
            pins[pin.name] = next(iter(pin.specifier)).version
    wanted = [Requirement(line) for line in metadata.requires('kd-plugins')]
    checked = {need.name for need in wanted if need.name in pins and need.specifier.contains(pins[need.name])}
    assert checked == {need.name for need in wanted if need.name in pins}
    assert checked >= {'torch', 'numpy', 'onedl-mmcv', 'onedl-mmdetection', 'ultralytics', 'timm'}


def test_users_type_checkers_see_our_types():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    assert 'py.typed' in config['options.package_data']['*'].split(', ')
    assert (ROOT / 'kd_plugins' / 'py.typed').exists()


def test_types_are_checked_strictly():
    """A new package is strict from the start; only those that lean on untyped frameworks are excepted."""
    tomllib = pytest.importorskip('tomllib')
    config = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['mypy']
    looser = [o for o in config['overrides'] if o.keys() & {'disable_error_code', 'ignore_errors'}]
    modules = {module.split('.')[1] for o in looser for module in o['module'] if '.' in module}
    assert config['strict'] and config['files'] == ['kd_plugins']
    assert modules and not modules & set(STRICT) and 'kd_plugins.*' not in {m for o in looser for m in o['module']}


def test_tests_cannot_install_behind_our_back():
    assert os.environ['PIP_NO_INDEX'] == '1'
