"""Fixtures of the real runs."""

import functools
import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: Files that take a minute or more, begun first, so that all workers end at about the same time.
LONG = (
    'test_promises',
    'test_comparison',
    'test_yolo_training',
    'test_options',
    'test_yolo_matrix',
    'test_yolo_cli',
    'test_bad_input',
)


def pytest_collection_modifyitems(items):
    """Put long files first; with ``--dist loadfile --no-loadscope-reorder`` workers take them in this order."""
    here = {f'{name}.py': i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: here.get(item.path.name, len(LONG)) if item.path.parent == HERE else -1)


@pytest.fixture(scope='session', autouse=True)
def quick_runs_apart():
    """What holds for all of MMEngine's runs in this process."""
    if importlib.util.find_spec('mmengine'):  # or there is Ultralytics alone
        from tests.integration.lab import keep_apart, skip_overhead

        skip_overhead()
        keep_apart()


@pytest.fixture(scope='session')
def labs(tmp_path_factory):
    """``labs(name)``: data, configs and ways to run them; one set of each kind for all real runs."""
    from tests.integration.labs import LABS

    return functools.cache(lambda name: LABS[name](tmp_path_factory.mktemp(name)))


@pytest.fixture(scope='session')
def lab(labs):
    """That of detectors."""
    return labs('detection')


@pytest.fixture(scope='session')
def seg_lab(labs):
    """That of segmentors."""
    return labs('segmentation')


@pytest.fixture(scope='session')
def cls_lab(labs):
    """That of classifiers."""
    return labs('classification')


@pytest.fixture
def runners(monkeypatch):
    """The runners that a command in this process trained."""
    from mmengine.runner import Runner

    found = []
    train = Runner.train
    monkeypatch.setattr(Runner, 'train', lambda self: found.append(self) or train(self))
    return found
