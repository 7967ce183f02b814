#!/usr/bin/env python3
"""Install the frameworks and this project into a virtual environment; ``make`` calls it before everything else.

Standard library only: it runs before anything is installed. Each finished step leaves a stamp (a hash of what it was
made from), so a second call does nothing and an interrupted one is picked up where it stopped. It must *parse* on any
Python 3.6+, in order to tell users of an unsupported one what to do.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUPPORTED = ((3, 10), (3, 11), (3, 12), (3, 13))
WITH_MM = SUPPORTED[:3]  # those on which the OneDL builds of mmcv, mmdet and mmseg are known to work
STATE = '.kd_install'  # inside the virtual environment: stamps, lock, log and scratch space
HEARTBEAT = 15.0  # seconds between two signs of life of a long step
# Disk (GB), its build included, and minutes (on two cores, apart from a slow network) that each part needs while it is
# not there yet; ultralytics stands for all frameworks. And what pip may keep of downloads.
NEEDS_GB = {'torch': 5.0, 'onedl_mmcv': 1.0, 'ultralytics': 1.0}
MINUTES = {'torch': 4, 'onedl_mmcv': 10, 'ultralytics': 4}
CACHE_GB = 3.0


class Stop(Exception):
    """One sentence for the user; the installation cannot go on."""


# -- what the machine must offer, checked before anything is installed -----------------------------------------------

PROBE = """
import importlib.util as util, json, os, sys, sysconfig
print(json.dumps(dict(
    version=sys.version_info[:2],
    venv=all(util.find_spec(name) for name in ('venv', 'ensurepip')),
    headers=os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))))
"""


def problem_of(python):
    """Say in one sentence why `python` cannot be used, or return None."""
    names = ', '.join('%d.%d' % version for version in SUPPORTED)
    try:
        found = json.loads(subprocess.check_output([str(python), '-c', PROBE], stderr=subprocess.DEVNULL).decode())
    except (OSError, subprocess.CalledProcessError, ValueError):
        return f'{python} does not run; name a Python of {names} with PYTHON=.'
    version = '%d.%d' % tuple(found['version'])
    if tuple(found['version']) > SUPPORTED[-1]:
        return (
            f'Python {version} ({python}) is too new: no release of these frameworks has been tried on it yet; install '
            f'one of {names}, or name it with PYTHON=.'
        )
    if tuple(found['version']) not in SUPPORTED:
        return f'Python {version} ({python}) is not supported; install one of {names}, or name it with PYTHON=.'
    if not found['venv']:
        return (
            f'Python {version} ({python}) lacks the venv or ensurepip module '
            f'(Debian, Ubuntu: apt install python{version}-venv).'
        )
    if not found['headers'] and tuple(found['version']) in WITH_MM:
        return (
            f'Python {version} ({python}) lacks its C headers (Python.h), needed to build mmcv '
            f'(Debian, Ubuntu: apt install python{version}-dev).'
        )
    return None


def choose_python(exact):
    """The interpreter to make the environment from: this one, or (unless `exact`) the first on PATH that has it all."""
    problem = problem_of(sys.executable)
    if problem is None and (exact or version_of(sys.executable) in WITH_MM):
        return sys.executable
    for name in () if exact else ('python3.12', 'python3.11', 'python3.10'):
        other = shutil.which(name)
        if other and problem_of(other) is None:
            return other
    if problem is None:
        return sys.executable
    raise Stop(problem)


def version_of(python):
    """Version of an interpreter that runs, such as (3, 12)."""
    return tuple(json.loads(subprocess.check_output([str(python), '-c', PROBE]).decode())['version'])


def pip_cache():
    """The folder of pip's cache."""
    folder = os.environ.get('PIP_CACHE_DIR') or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'pip')
    return Path(folder).expanduser()


def cached_mmcv(version):
    """Whether pip's cache has a build of the pinned mmcv for a Python; which torch it fits shows when it is used."""
    pin = re.search(r'^onedl-mmcv==(\S+)', (ROOT / 'constraints.txt').read_text(), re.M)
    name = 'onedl_mmcv-{}-cp{}{}-*.whl'.format(pin.group(1) if pin else '*', *version)
    return any((pip_cache() / 'wheels').glob('**/' + name))


def check_compiler():
    """mmcv's operators have no binary distribution: a C++17 compiler builds them, once."""
    command = shlex.split(os.environ.get('CXX', 'c++'))
    if not shutil.which(command[0]):
        raise Stop(
            f'No C++ compiler ({command[0]}) to build mmcv with: install g++ '
            '(Debian, Ubuntu: apt install g++), or name one with CXX=.'
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'probe.cpp')
        source.write_text('#include <optional>\nint main() { return std::optional<int>(0).value(); }\n')
        done = subprocess.run(
            [*command, '-std=c++17', str(source), '-o', str(Path(folder, 'probe'))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise Stop(f'{" ".join(command)} cannot build a C++17 program: install g++ 9 or newer, or set CXX=.')


def check_disk(needs_gb):
    """Compare the free space with `needs_gb`, pairs of a path and GB, added up per file system."""
    needs = {}
    for path, gigabytes in needs_gb:
        while not path.exists():
            path = path.parent
        device = path.stat().st_dev
        first, total = needs.get(device, (path, 0.0))
        needs[device] = (first, total + gigabytes)
    for path, gigabytes in needs.values():
        free = shutil.disk_usage(str(path)).free / 1e9
        if free < gigabytes:
            raise Stop(
                f'Too little disk: {free:.1f} GB free in {path}, about {gigabytes:.1f} GB needed; '
                'free some, or choose other places with VENV= and PIP_CACHE_DIR=.'
            )


# -- the steps ---------------------------------------------------------------------------------------------------------


class Installer:
    """The steps, in order, on one virtual environment.

    Args:
        venv: Folder of the environment; made when missing.
        exact: Whether the running interpreter was asked for by name (then an environment of another version is an
            error, and no other interpreter is looked for).
    """

    def __init__(self, venv, exact):
        self.venv = venv
        self.exact = exact
        self.python = venv / 'bin' / 'python'
        self.state = venv / STATE
        self.log = self.state / 'install.log'
        self.lock = None
        # title, what to do, files it depends on besides constraints.txt and this one
        project = [ROOT / 'setup.cfg', ROOT / 'kd_plugins' / '__init__.py']
        self.steps = (
            ('virtual environment', self.make_venv, []),
            ('build tools', self.install_build_tools, []),
            ('torch and torchvision (3 GB)', self.install_torch, []),
            ('mmcv, its operators compiled: 10 minutes on 2 cores, the first time', self.build_mmcv, []),
            ('frameworks and this project', self.install_project, project),
        )

    def make_venv(self):
        """Make the environment; what an interrupted call left of one is made again."""
        if self.healthy():
            return
        for child in self.venv.iterdir():  # only what this wrote: see `prepare`
            if child != self.state:
                shutil.rmtree(str(child)) if child.is_dir() and not child.is_symlink() else child.unlink()
        (self.state / 'made-here').touch()
        self._call(choose_python(self.exact), '-m', 'venv', self.venv)

    def install_build_tools(self):
        self._pip('--upgrade', 'pip', 'setuptools', 'wheel', 'packaging', 'ninja', 'psutil')

    def install_torch(self):
        self._pip('torch', 'torchvision')

    def build_mmcv(self):
        """Compile mmcv's operators, or take pip's cached build if it fits this torch."""
        if not self.with_mm():
            print(f'      not on Python {self.version()}: timm, Ultralytics and the losses only', flush=True)
            return
        build = ('-v', '--no-build-isolation', 'onedl-mmcv')  # -v: the compiler's progress reaches the log
        self._pip(*build, **self._build_environment())
        self._mend_opencv()
        if not self._runs('-c', 'import mmcv.ops'):  # pip's cache does not know which torch a build was made with
            print('      the cached build of mmcv does not fit this torch: compiling it again', flush=True)
            self._pip('--force-reinstall', '--no-deps', '--no-cache-dir', *build, **self._build_environment())
            self._require('mmcv.ops')

    def install_project(self):
        self._pip('--no-build-isolation', '-e', '.[all]')
        self._mend_opencv()
        for module in ('torchvision', *(['mmcv.ops'] if self.with_mm() else []), 'kd_plugins'):
            self._require(module)

    def _build_environment(self):
        """Variables of the mmcv build; the user's own win."""
        memory_gb = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
        jobs = max(1, min(len(os.sched_getaffinity(0)), int(memory_gb / 2)))  # a compiler process takes up to 2 GB
        variables = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': os.environ.get('MAX_JOBS', str(jobs))}
        if not (shutil.which('nvcc') or os.environ.get('CUDA_HOME')):
            variables['CUDA_VISIBLE_DEVICES'] = ''  # mmcv would fail to build CUDA operators for a GPU it sees
            if shutil.which('nvidia-smi'):
                print('      no nvcc: mmcv gets CPU operators only, detectors will not train on this GPU', flush=True)
        return variables

    def _mend_opencv(self):
        """Put the headless build over OpenCV where a server has no libGL (mmcv and Ultralytics ask for the other)."""
        if self._runs('-c', 'import cv2'):
            return
        print('      no graphics libraries here: using the headless build of OpenCV', flush=True)
        self._pip('--force-reinstall', '--no-deps', 'opencv-python-headless')
        self._require('cv2')

    # -- running things ------------------------------------------------------------------------------------------------

    def _runs(self, *arguments):
        """Whether the environment's Python runs `arguments` without an error; its output goes to the log."""
        with self.log.open('ab') as log:
            try:
                return subprocess.call([str(self.python), *arguments], stdout=log, stderr=log, cwd=str(ROOT)) == 0
            except OSError:
                return False

    def _require(self, module):
        if not self._runs('-c', f'import {module}'):
            error = tail(self.log).strip().splitlines()[-1]
            raise Stop(f'{module} was installed but cannot be imported: {error} (log: {self.log})')

    def _pip(self, *arguments, **variables):
        self._call(self.python, '-m', 'pip', 'install', '--progress-bar', 'off', '-c', 'constraints.txt', *arguments,
                   **variables)  # fmt: skip

    def _call(self, *command, **variables):
        """Run a command into the log, with a sign of life now and then. The lock lives as long as the command."""
        scratch = self.state / 'tmp'  # on the environment's disk: /tmp is often small; and a kill leaves nothing behind
        shutil.rmtree(str(scratch), ignore_errors=True)
        scratch.mkdir()
        environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK='1', PIP_USER='0', **variables)
        environment.setdefault('TMPDIR', str(scratch))
        environment.pop('PYTHONPATH', None)
        start = beat = time.monotonic()
        with self.log.open('ab') as log:
            log.write(('\n$ %s\n' % ' '.join(map(str, command))).encode())
            log.flush()
            process = subprocess.Popen(
                [str(word) for word in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=str(ROOT),
                env=environment, pass_fds=[self.lock.fileno()], start_new_session=True,
            )  # fmt: skip
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if time.monotonic() - beat >= HEARTBEAT:
                    beat = time.monotonic()
                    print(f'      {clock(beat - start)}  {progress(self.log)}', flush=True)
        finally:
            if process.poll() is None:  # interrupted: pip and its compilers too
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            shutil.rmtree(str(scratch), ignore_errors=True)
        if process.returncode:
            raise Stop(f'{reason(self.log)} (whole log: {self.log}). The same command goes on from here.')

    def drop_half_installed(self):
        """Remove records of distributions whose installation was cut off: pip would take them for installed."""
        for info in self.venv.glob('lib/python3*/site-packages/*.dist-info'):
            if not (info / 'RECORD').exists():
                shutil.rmtree(str(info))

    # -- stamps --------------------------------------------------------------------------------------------------------

    def version(self):
        """Python version of the environment, such as '3.11'; '' when there is none that could run."""
        config = self.venv / 'pyvenv.cfg'
        if not (config.exists() and self.python.exists()):
            return ''
        found = re.search(r'^version(?:_info)? *= *(\d+\.\d+)', config.read_text(), re.M)
        return found.group(1) if found else ''

    def with_mm(self):
        """Whether the environment's Python is one for mmcv, mmdet and mmseg."""
        return tuple(int(number) for number in self.version().split('.')) in WITH_MM

    def missing(self, version):
        """What is not there yet and can be on this Python, of the parts of `NEEDS_GB`."""
        return [n for n in NEEDS_GB if not self.has(n) and (version in WITH_MM or not n.startswith('onedl'))]

    def forecast(self, version):
        """How long the installation will take, how much disk it needs, and what need not be compiled, in a sentence."""
        missing = self.missing(version)
        minutes = {name: MINUTES[name] for name in missing}
        cached = cached_mmcv(version)
        if 'onedl_mmcv' in minutes:
            minutes['onedl_mmcv'] = 1 if cached else max(2, 2 * minutes['onedl_mmcv'] // len(os.sched_getaffinity(0)))
        text = 'About {} minutes and {:.0f} GB of disk (torch and the frameworks are downloads of about 3 GB)'.format(
            max(1, sum(minutes.values())), max(1, sum(NEEDS_GB[name] for name in missing))
        )
        if 'onedl_mmcv' not in minutes:
            return text + '.'
        return text + ("; pip's cache has mmcv for this Python." if cached else '; mmcv is compiled, once.')

    def stamps(self):
        """Yield the stamp file of each step and the text it must hold."""
        made_from = hashlib.sha256(f'{self.version()} {ROOT} {self.venv}'.encode())
        for path in (Path(__file__), ROOT / 'constraints.txt'):
            made_from.update(path.read_bytes())
        for number, (_, _, files) in enumerate(self.steps, 1):
            for path in files:
                made_from.update(path.read_bytes())
            yield self.state / f'{number}.done', made_from.hexdigest()

    def due(self):
        """Index of the first step to run; the number of steps when everything is up to date."""
        if not self.version():
            return 0
        for index, (stamp, text) in enumerate(self.stamps()):
            if not stamp.exists() or stamp.read_text() != text:
                return index
        return len(self.steps)

    # -- the whole -----------------------------------------------------------------------------------------------------

    def healthy(self):
        """Whether there is an environment whose Python and pip run."""
        command = [str(self.python), '-m', 'pip', '--version']
        quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
        return bool(self.version()) and subprocess.call(command, **quiet) == 0

    def has(self, distribution):
        """Whether `distribution` (spelled like its folder) is installed completely: pip writes RECORD last."""
        return any(self.venv.glob(f'lib/python3*/site-packages/{distribution}-[0-9]*.dist-info/RECORD'))

    def prepare(self):
        """Check the machine and the target folder before the first change; returns the forecast."""
        version = self.version()
        if version:
            problem = problem_of(self.python)
            if problem:
                raise Stop(problem)
            version = version_of(self.python)
        else:
            version = version_of(choose_python(self.exact))
        used = self.venv.exists() and any(self.venv.iterdir())
        if used and not (self.state / 'made-here').exists() and not self.healthy():
            raise Stop(f'{self.venv} is no working virtual environment with pip: remove it, or choose another VENV=.')
        missing = self.missing(version)
        if 'onedl_mmcv' in missing:
            check_compiler()
        needs = [(self.venv, sum(NEEDS_GB[name] for name in missing))]
        check_disk([*needs, (pip_cache(), CACHE_GB)] if 'torch' in missing else needs)
        return self.forecast(version)

    def run(self):
        version, running = self.version(), '%d.%d' % sys.version_info[:2]
        if version and self.exact and version != running:
            raise Stop(f'{self.venv} has Python {version}, PYTHON= is {running}: remove it, or choose another VENV=.')
        if self.due() == len(self.steps):
            return
        forecast = self.prepare()
        self.state.mkdir(parents=True, exist_ok=True)
        self.lock = (self.state / 'lock').open('w')
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f'install: another installation into {self.venv} is running, waiting for it', flush=True)
            fcntl.flock(self.lock, fcntl.LOCK_EX)
        first = self.due()  # again: the other one may have finished it
        if first == len(self.steps):
            return
        print(f'Installing into {self.venv} (log: {self.log})\n{forecast}', flush=True)
        self.drop_half_installed()
        begin = time.monotonic()
        for index, (title, action, _) in enumerate(self.steps[first:], first):
            label, start = f'[{index + 1}/{len(self.steps)}]', time.monotonic()
            print(f'{label} {title}', flush=True)
            action()
            stamp, text = list(self.stamps())[index]
            stamp.write_text(text)
            print(f'{label} done in {clock(time.monotonic() - start)}', flush=True)
        print(f'Installation complete after {clock(time.monotonic() - begin)}', flush=True)


# -- reading the log ---------------------------------------------------------------------------------------------------


def clock(seconds):
    """Seconds as m:ss."""
    return '%d:%02d' % divmod(int(seconds), 60)


def tail(log):
    """The end of `log` as text."""
    with log.open('rb') as file:
        file.seek(max(0, log.stat().st_size - 65536))
        return file.read().decode(errors='replace')


PROGRESS = re.compile(r'\[(\d+)/(\d+)\] |((?:Collecting|Downloading|Building|Installing|Successfully) .*)')


def progress(log):
    """What pip or the compiler did last, in at most 90 characters."""
    for line in reversed(tail(log).splitlines()):
        found = PROGRESS.match(line.strip())
        if found:
            done, files, words = found.groups()
            return words[:90] if words else f'{done} of {files} files compiled'
    return 'working'


REASONS = (
    ('No space left on device', 'The disk ran full'),
    ('new connection|Connection refused|Name or service not known', 'The package registry cannot be reached'),
    ('CERTIFICATE_VERIFY_FAILED', "The package registry's certificate was not accepted"),
    ('No matching distribution found for ([^ \n]+)', 'pip found no {} for this Python in the configured registry'),
    ('Killed signal terminated program|virtual memory exhausted', 'A compiler ran out of memory, try MAX_JOBS=1'),
    ('MemoryError|Killed', 'A command was killed, probably for lack of memory'),
    ('(\\S+ (?:fatal )?error: .*)', 'The build failed: {}'),
    ('(ERROR: .*)', '{}'),
)


def reason(log):
    """Name the cause of a failed command in one clause, from what it wrote last."""
    text = tail(log).rpartition('\n$ ')[2]
    for pattern, sentence in REASONS:
        found = re.search(pattern, text)
        if found:
            return sentence.format(*found.groups())
    return 'A command failed'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--venv', default='.venv', type=Path, help='folder of the virtual environment')
    parser.add_argument('--exact', action='store_true', help='use the Python that runs this and no other')
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        Installer(Path(os.path.abspath(str(options.venv.expanduser()))), options.exact).run()
    except Stop as stop:
        sys.exit(f'install: {stop}')
    except KeyboardInterrupt:
        sys.exit('\ninstall: interrupted; the same command goes on from here.')


if __name__ == '__main__':
    main()
