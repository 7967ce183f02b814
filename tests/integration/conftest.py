"""Fixtures of the real runs."""

import pytest
import torch


@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    """Data, configs and ways to run them (one set for all real runs)."""
    from tests.integration.lab import Lab, hurry

    torch.set_num_threads(1)
    hurry()
    return Lab(tmp_path_factory.mktemp('lab'))


@pytest.fixture(scope='session')
def seg_lab(tmp_path_factory):
    """The same for segmentors."""
    from tests.integration.lab import hurry
    from tests.integration.seg_lab import SegLab

    torch.set_num_threads(1)
    hurry()
    return SegLab(tmp_path_factory.mktemp('seg_lab'))


@pytest.fixture(scope='session')
def cls_lab(tmp_path_factory):
    """The same for classifiers."""
    from tests.integration.cls_lab import ClsLab
    from tests.integration.lab import hurry

    torch.set_num_threads(1)
    hurry()
    return ClsLab(tmp_path_factory.mktemp('cls_lab'))
