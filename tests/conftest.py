"""Settings of every test: one thread, no hidden pip call, the lanes' markers."""

import atexit
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
os.environ['YOLO_CONFIG_DIR'] = tempfile.mkdtemp(prefix='yolo_config_')
atexit.register(shutil.rmtree, os.environ['YOLO_CONFIG_DIR'], ignore_errors=True)
os.environ['YOLO_OFFLINE'] = 'true'
if plots := importlib.util.find_spec('matplotlib'):
    font = Path(plots.origin).parent / 'mpl-data' / 'fonts' / 'ttf' / 'DejaVuSans.ttf'
    (settings := Path(os.environ['YOLO_CONFIG_DIR'], 'Ultralytics')).mkdir()
    shutil.copy(font, settings / 'Arial.ttf')

INTEGRATION = Path(__file__).parent / 'integration'


def seed_all(name):
    """Seed what draws random numbers, as far as it has been imported."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    if numpy := sys.modules.get('numpy'):
        numpy.random.seed(seed)
    if torch := sys.modules.get('torch'):
        torch.manual_seed(seed)


@pytest.fixture(scope='module', autouse=True)
def files_apart(request):
    """Which file ran before in a worker is the scheduler's choice: its random numbers and its scope end with it."""
    seed_all(request.node.nodeid)
    yield
    if registry := sys.modules.get('mmengine.registry'):
        registry.DefaultScope._instance_dict.clear()


@pytest.fixture(autouse=True)
def same_numbers_every_time(request):
    """A test draws the same numbers in every order."""
    seed_all(request.node.nodeid)


def pytest_collection_modifyitems(items):
    """Mark by folder: whatever lies in tests/integration is a real run."""
    for item in items:
        if INTEGRATION in item.path.parents:
            item.add_marker(pytest.mark.real)
        if item.get_closest_marker('gpu'):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason='no CUDA device'))
