"""Fixtures of the real runs."""

import importlib.util

import pytest


@pytest.fixture(scope='session', autouse=True)
def quick_runs_apart():
    """What holds for all of MMEngine's runs in this process."""
    if importlib.util.find_spec('mmengine'):  # or there is Ultralytics alone
        from tests.integration.lab import hurry, keep_apart

        hurry()
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
