"""One name for a type, however it is written."""

import pytest
import torch

from kd_plugins.type_names import type_name


def build():
    """A builder that a config may name."""


@pytest.mark.parametrize('value', ['SGD', 'mmdet.SGD', 'torch.optim.sgd.SGD', torch.optim.SGD])
def test_names_scopes_paths_and_classes(value):
    assert type_name(value) == 'SGD'


def test_functions_and_nothing():
    assert type_name(build) == 'build' and type_name(None) == 'None'
