"""tools/install.py: one clear sentence before anything is installed; finished steps are kept, others done again."""

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / 'tools' / 'install.py'
Usage = namedtuple('Usage', 'total used free')


@pytest.fixture
def install():
    spec = importlib.util.spec_from_file_location('install_under_test', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(install, tmp_path, monkeypatch):
    """A copy of the files that the stamps depend on."""
    root = tmp_path / 'project'
    (root / 'kd_plugins').mkdir(parents=True)
    for name in ('constraints.txt', 'setup.cfg', 'kd_plugins/__init__.py'):
        (root / name).write_text(name)
    monkeypatch.setattr(install, 'ROOT', root)
    return root


@pytest.fixture
def installer(install, project, tmp_path):
    """An installer on a complete environment whose steps only note that they were called."""
    venv = tmp_path / 'an environment'
    (venv / 'bin').mkdir(parents=True)
    (venv / 'bin' / 'python').symlink_to(sys.executable)
    (venv / 'pyvenv.cfg').write_text('home = /somewhere\nversion = 3.11.7\n')
    made = install.Installer(venv, exact=False)
    made.called = []
    made.steps = tuple((title, lambda title=title: made.called.append(title), files) for title, _, files in made.steps)
    made.prepare = lambda: None
    made.state.mkdir()
    for stamp, text in made.stamps():
        stamp.write_text(text)
    return made


def fake_python(path, version=(3, 11), venv=True, headers=True):
    """An executable that answers the installer's questions like a Python of that kind."""
    answer = json.dumps({'version': version, 'venv': venv, 'headers': headers})
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ('kind', 'words'),
    [
        ({'version': (3, 14)}, ('3.14', 'too new', 'has been tried', '3.10, 3.11, 3.12, 3.13')),
        ({'version': (3, 8)}, ('3.8', 'not supported')),
        ({'venv': False}, ('venv', 'apt install python3.11-venv')),
        ({'headers': False}, ('Python.h', 'apt install python3.11-dev')),
    ],
)
def test_python_that_cannot_be_used(install, tmp_path, kind, words):
    problem = install.problem_of(fake_python(tmp_path / 'python', **kind))
    assert all(word in problem for word in words) and '\n' not in problem


def test_python_that_does_not_run(install, tmp_path):
    assert 'does not run' in install.problem_of(tmp_path / 'nothing')
    assert install.problem_of(sys.executable) is None


def test_another_python_is_looked_for_unless_one_was_named(install, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'executable', fake_python(tmp_path / 'python3', version=(3, 14)))
    fake_python(tmp_path / 'python3.12', version=(3, 12), venv=False)
    good = fake_python(tmp_path / 'python3.10', version=(3, 10))
    monkeypatch.setenv('PATH', str(tmp_path))
    assert install.choose_python(exact=False) == good
    with pytest.raises(install.Stop, match=r'3\.14 .* too new'):
        install.choose_python(exact=True)


def test_a_python_without_mmdet_is_the_second_choice(install, tmp_path, monkeypatch):
    new = fake_python(tmp_path / 'python3', version=(3, 13), headers=False)
    monkeypatch.setattr(sys, 'executable', new)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert install.choose_python(exact=False) == install.choose_python(exact=True) == new
    older = fake_python(tmp_path / 'python3.11', version=(3, 11))
    assert install.choose_python(exact=False) == older and install.choose_python(exact=True) == new


def test_forecast(install, tmp_path, monkeypatch):
    monkeypatch.setenv('PIP_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1})
    installer = install.Installer(tmp_path / 'venv', exact=False)
    assert installer.forecast((3, 12)).startswith('About 18 minutes and 7 GB of disk')
    assert installer.forecast((3, 12)).endswith('mmcv is compiled, once.')
    # Another Python's build is none.
    wheel = tmp_path / 'cache' / 'wheels' / '1f' / 'onedl_mmcv-2.3.6-cp312-cp312-linux_x86_64.whl'
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    assert installer.forecast((3, 12)).startswith('About 9 minutes')
    assert "pip's cache has mmcv" in installer.forecast((3, 12))
    assert 'mmcv is compiled' in installer.forecast((3, 11))
    without = installer.forecast((3, 13))
    assert without.startswith('About 8 minutes and 6 GB') and 'mmcv' not in without


def test_missing_and_unfit_compiler(install, monkeypatch):
    found = shutil.which(os.environ.get('CXX', 'c++'))
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(install.Stop, match=r'No C\+\+ compiler \(no-such-compiler\).*apt install g\+\+'):
        install.check_compiler()
    monkeypatch.setenv('CXX', 'false')
    with pytest.raises(install.Stop, match=r'C\+\+17'):
        install.check_compiler()
    if found:
        monkeypatch.setenv('CXX', found)
        install.check_compiler()


def test_too_little_disk(install, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(0, 0, 8e9))
    with pytest.raises(install.Stop, match=r'8\.0 GB free .* about 9\.5 GB needed'):
        install.check_disk([(tmp_path / 'not' / 'there', 6.5), (tmp_path, 3.0)])  # one file system: added up
    install.check_disk([(tmp_path, 7.9)])


def test_nothing_is_written_when_the_machine_lacks_something(tmp_path):
    environment = {**os.environ, 'CXX': 'no-such-compiler'}
    command = [sys.executable, str(SCRIPT), '--venv', str(tmp_path / 'env')]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and done.stdout == ''
    assert done.stderr.startswith('install: No C++ compiler') and done.stderr.count('\n') == 1
    assert not (tmp_path / 'env').exists()


def test_foreign_folder_is_left_alone(install, tmp_path):
    (tmp_path / 'thesis.tex').write_text('x')
    with pytest.raises(install.Stop, match='no working virtual environment'):
        install.Installer(tmp_path, exact=False).run()
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


def test_environment_of_another_python_is_not_mixed(install, installer):
    (installer.venv / 'pyvenv.cfg').write_text('version = 3.9.1\n')
    installer.exact = True
    with pytest.raises(install.Stop, match=r'has Python 3\.9'):
        installer.run()


def test_up_to_date_does_nothing(installer, capsys):
    installer.run()
    assert installer.called == [] and capsys.readouterr().out == ''


@pytest.mark.parametrize(
    ('changed', 'steps'), [('constraints.txt', 5), ('setup.cfg', 1), ('kd_plugins/__init__.py', 1)]
)
def test_a_change_repeats_only_what_depends_on_it(installer, project, changed, steps, capsys):
    (project / changed).write_text('changed')
    installer.run()
    assert len(installer.called) == steps
    assert f'[{6 - steps}/5]' in capsys.readouterr().out
    installer.called.clear()
    installer.run()
    assert installer.called == []


def test_a_failed_step_is_the_next_calls_first(install, installer):
    (installer.state / '3.done').unlink()
    title, action, files = installer.steps[3]

    def fail():
        raise install.Stop('no network')

    (installer.state / '4.done').unlink()
    installer.steps = (*installer.steps[:3], (title, fail, files), *installer.steps[4:])
    with pytest.raises(install.Stop, match='no network'):
        installer.run()
    installer.steps = (*installer.steps[:3], (title, action, files), *installer.steps[4:])
    installer.called.clear()
    installer.run()
    assert installer.called[0] == title


def test_environment_without_its_interpreter_is_made_again(installer):
    (installer.venv / 'bin' / 'python').unlink()
    assert installer.due() == 0


def test_records_of_half_installed_distributions_are_dropped(installer):
    packages = installer.venv / 'lib' / 'python3.11' / 'site-packages'
    for name in ('whole-1.0.dist-info', 'half-1.0.dist-info'):
        (packages / name).mkdir(parents=True)
        (packages / name / 'METADATA').touch()
    (packages / 'whole-1.0.dist-info' / 'RECORD').touch()
    assert installer.has('whole') and not installer.has('half')
    installer.drop_half_installed()
    assert [path.name for path in packages.iterdir()] == ['whole-1.0.dist-info']


def test_second_call_waits_for_the_first(installer, capsys):
    stamp, text = list(installer.stamps())[4]
    stamp.unlink()
    with (installer.state / 'lock').open('w') as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=installer.run)
        second.start()
        shown, deadline = '', time.monotonic() + 20
        while 'waiting' not in shown and time.monotonic() < deadline:
            second.join(0.05)
            shown += capsys.readouterr().out
        assert 'waiting' in shown and second.is_alive() and installer.called == []
        stamp.write_text(text)  # the first call finishes
    second.join(20)
    assert not second.is_alive() and installer.called == []


def test_interruption_ends_what_was_started(tmp_path):
    code = (
        f'import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n'
        'import install, pathlib, signal\n'
        'signal.signal(signal.SIGTERM, signal.default_int_handler)\n'
        f'one = install.Installer(pathlib.Path({str(tmp_path)!r}), False)\n'
        "one.state.mkdir(); one.lock = (one.state / 'lock').open('w')\n"
        f"one._call('sh', '-c', 'sleep 60 & sleep 1; echo $! > {tmp_path}/pid; wait')\n"
    )
    with subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while not ((tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        grandchild = int((tmp_path / 'pid').read_text())
        process.send_signal(signal.SIGTERM)
        process.wait(10)
    deadline = time.monotonic() + 20
    while _runs(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(grandchild)


def _runs(process: int) -> bool:
    try:
        state = Path(f'/proc/{process}/stat').read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.rpartition(')')[2].split()[0] != 'Z'


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        ('OSError: [Errno 28] No space left on device', 'The disk ran full'),
        ('ERROR: No matching distribution found for torch==2.11.0\n', 'pip found no torch==2.11.0 for this Python'),
        ('g++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('nms.cpp:3:10: fatal error: nms.h: No such file', 'The build failed: nms.cpp:3:10: fatal error: nms.h'),
        ('all is well', 'A command failed'),
    ],
)
def test_failure_is_named(install, tmp_path, text, sentence):
    log = tmp_path / 'log'
    log.write_text('\n$ pip install older\nNo space left on device\n\n$ pip install this\n' + text)
    if 'No space' not in text:
        assert 'disk' not in install.reason(log)
    assert sentence in install.reason(log)


def test_progress(install, tmp_path):
    log = tmp_path / 'log'
    log.write_text('Collecting torch\n  [12/78] c++ -MMD\n noise\n')
    assert install.progress(log) == '12 of 78 files compiled'
    log.write_text('Collecting torch\nnoise')
    assert install.progress(log) == 'Collecting torch'
