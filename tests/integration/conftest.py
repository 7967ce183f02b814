"""Fixtures of the real runs."""

import pytest
import torch


@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    """Data, configs and ways to run them (one set for all real runs)."""
    import mmengine
    from mmengine.runner import Runner

    from tests.integration.lab import Lab

    torch.set_num_threads(1)
    # Each run in this process would ask compilers for their versions and format its config four times: 5 seconds.
    Runner._log_env = lambda runner, env_cfg: None
    mmengine.config.config.FormatCode = lambda text, **style: (text, True)
    return Lab(tmp_path_factory.mktemp('lab'))
