"""Fixtures of the real runs."""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: Files that take a minute or more, begun first, so that all workers end at about the same time.
LONG = ('test_comparison', 'test_yolo_training', 'test_options', 'test_yolo_matrix', 'test_yolo_cli', 'test_bad_input')


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
def lab(tmp_path_factory):
    """Data, configs and ways to run them (one set for all real runs)."""
    from tests.integration.lab import Lab

    return Lab(tmp_path_factory.mktemp('lab'))


@pytest.fixture(scope='session')
def seg_lab(tmp_path_factory):
    """The same for segmentors."""
    from tests.integration.seg_lab import SegLab

    return SegLab(tmp_path_factory.mktemp('seg_lab'))


@pytest.fixture(scope='session')
def cls_lab(tmp_path_factory):
    """The same for classifiers."""
    from tests.integration.cls_lab import ClsLab

    return ClsLab(tmp_path_factory.mktemp('cls_lab'))
