"""Fixtures of the real runs."""

import itertools

import pytest
import torch


@pytest.fixture(scope='session', autouse=True)
def runs_apart():
    """Give each run of this process a name of its own.

    MMEngine keeps loggers and message hubs by config and second; two runs within a second would share what they log.
    """
    try:
        from mmengine.runner import Runner
    except ImportError:  # with Ultralytics alone
        return
    setup, numbers = Runner.setup_env, itertools.count()

    def setup_env(runner, env_cfg):
        setup(runner, env_cfg)
        runner._timestamp += f'_{next(numbers):04}'

    Runner.setup_env = setup_env


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
