"""Settings of every test: one thread, no hidden pip call, the lanes' markers."""

import importlib.util
import os
import random
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

# Before torch is imported. One thread: small tensors run faster, and results do not depend on the machine's cores.
os.environ['OMP_NUM_THREADS'] = '1'
os.environ['MPLBACKEND'] = 'Agg'
# Some frameworks pip-install what they miss. Here that has to fail, in child processes too.
os.environ['PIP_NO_INDEX'] = '1'
os.environ['YOLO_AUTOINSTALL'] = 'false'
# Ultralytics writes its settings into the home folder otherwise, as soon as it is imported, and downloads a font that
# it does not find there. Each worker has a folder of its own.
HOME = tempfile.mkdtemp(prefix='kd_plugins_tests_')
os.environ['YOLO_CONFIG_DIR'] = HOME
os.environ['YOLO_OFFLINE'] = os.environ['YOLO_VERBOSE'] = 'true'
if plots := importlib.util.find_spec('matplotlib'):
    font = Path(plots.origin).parent / 'mpl-data' / 'fonts' / 'ttf' / 'DejaVuSans.ttf'
    (settings := Path(HOME, 'Ultralytics')).mkdir()
    shutil.copy(font, settings / 'Arial.ttf')
# What was compiled for another processor crashes on this one, and torch does not always notice.
os.environ['TORCHINDUCTOR_CACHE_DIR'] = str(Path(HOME, 'inductor'))

INTEGRATION = Path(__file__).parent / 'integration'
EXTENDING = Path(__file__).parent / 'unit' / 'extending'


def pytest_configure(config):
    """A GPU is for the tests that need one (``-m gpu``); others compare with what was computed on the CPU."""
    if 'gpu' not in config.option.markexpr:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


def pytest_unconfigure():
    """Remove what was made above; not at exit, which workers do not come by."""
    shutil.rmtree(HOME, ignore_errors=True)


def begin(name):
    """Seed what draws random numbers, as far as it has been imported, and take back Ultralytics' threads.

    Its trainer sets as many as there are cores; other sums than in a child process that uses one are the result.
    """
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    if numpy := sys.modules.get('numpy'):
        numpy.random.seed(seed)
    if torch := sys.modules.get('torch'):
        torch.manual_seed(seed)
        torch.set_num_threads(1)


@pytest.fixture(scope='module', autouse=True)
def files_apart(request):
    """Which file ran before in a worker is the scheduler's choice: what it drew and what its runs left end with it."""
    begin(request.node.nodeid)
    yield
    if 'mmengine.registry' in sys.modules:
        from mmengine.logging import MessageHub, MMLogger
        from mmengine.registry import DefaultScope

        for handler in (h for logger in MMLogger._instance_dict.values() for h in logger.handlers):
            handler.close()  # each holds a file open
        for kept in (DefaultScope, MessageHub, MMLogger):
            kept._instance_dict.clear()


@pytest.fixture(autouse=True)
def same_numbers_every_time(request):
    """A test draws the same numbers in every order."""
    begin(request.node.nodeid)


def pytest_collection_modifyitems(items):
    """Mark by folder: whatever lies in tests/integration is a real run."""
    for item in items:
        if INTEGRATION in item.path.parents:
            item.add_marker(pytest.mark.real)
        if item.get_closest_marker('gpu'):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason='needs -m gpu and a CUDA device'))


@pytest.fixture
def own_files(monkeypatch):
    """Names of the modules in tests/unit/extending, by what they add; what they register ends with the test."""
    from kd_plugins.distiller import combining, schedules, weighting
    from kd_plugins.predictions import form, readers
    from kd_plugins.teachers import sources, teacher_kind

    teacher_kind({})  # those of the package are registered for good
    for module, table in (
        (schedules, '_PARSERS'),
        (weighting, '_KINDS'),
        (combining, '_KINDS'),
        (form, '_FORMS'),
        (readers, '_readers'),
        (sources, '_SOURCES'),
    ):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    names = {path.stem.removeprefix('own_'): path.stem for path in EXTENDING.glob('own_*.py')}
    monkeypatch.syspath_prepend(EXTENDING)
    for name in names.values():
        # Imported, and so registered, anew.
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    return names
