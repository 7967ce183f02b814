"""Reading checkpoints: every common form, nothing executed, clear refusals."""

import collections
import os

import numpy as np
import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.teachers import find_weights, load_checkpoint

WEIGHTS = {'a.weight': torch.arange(6.0).view(2, 3), 'a.steps': torch.tensor(3), 'b': torch.ones(2).bfloat16()}


class Payload:
    """Runs a command when it is unpickled by an ordinary loader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


class Odd:
    """An object with state, items and slots of its own, like MMEngine's message hub."""

    def __init__(self):
        self.values = [1, 2]


def save(tmp_path, content):
    path = str(tmp_path / 'x.pth')
    torch.save(content, path)
    return path


def equal(found):
    return set(found) == set(WEIGHTS) and all(torch.equal(found[k], v) for k, v in WEIGHTS.items())


@pytest.mark.parametrize(
    'content',
    [
        dict(state_dict=WEIGHTS, meta=dict(epoch=1)),
        dict(model=WEIGHTS),
        collections.OrderedDict(WEIGHTS),
        {f'module.{k}': v for k, v in WEIGHTS.items()},
        dict(state_dict=WEIGHTS, meta={}, message_hub=dict(scalars=np.float64(1), array=np.arange(3)), odd={1, 2}),
    ],
    ids=['mmengine', 'model', 'bare', 'DataParallel', 'numpy'],
)
def test_forms(tmp_path, content):
    path = save(tmp_path, content)
    assert equal(find_weights(load_checkpoint(path), path)[0])


def test_names_of_classes_survive(tmp_path):
    path = save(tmp_path, dict(state_dict=WEIGHTS, meta=dict(dataset_meta=dict(classes=('cat', 'dog')), x=Odd())))
    assert find_weights(load_checkpoint(path), path)[1]['dataset_meta']['classes'] == ('cat', 'dog')


def test_nothing_stored_is_executed(tmp_path):
    trap = tmp_path / 'executed'
    path = save(tmp_path, dict(state_dict=WEIGHTS, meta=dict(hub=Payload(trap)), odd=Odd()))
    assert equal(find_weights(load_checkpoint(path), path)[0])
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), 'the trap does not work: the test is void'


def test_truncated(tmp_path):
    path = save(tmp_path, dict(state_dict={'w': torch.ones(5000)}))
    with open(path, 'r+b') as file:
        file.truncate(8000)
    with pytest.raises(DistillError, match=r"'.*x\.pth' \(8,000 bytes\) is not a readable checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize('data', [b'', b'<html>not found</html>', b'PK\x03\x04'])
def test_not_a_checkpoint(tmp_path, data):
    path = tmp_path / 'x.pth'
    path.write_bytes(data)
    with pytest.raises(DistillError, match='not a readable checkpoint'):
        load_checkpoint(str(path))


def test_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / 'yolox_l.pth').touch()
    with pytest.raises(DistillError, match=r"does not exist; in '.*': did you mean 'yolox_l\.pth'"):
        load_checkpoint(str(tmp_path / 'yolox_1.pth'))
    with pytest.raises(DistillError, match=r'the folder .* does not exist either'):
        load_checkpoint(str(tmp_path / 'no' / 'x.pth'))
    with pytest.raises(DistillError, match=r'is a folder, not a file; it holds yolox_l\.pth'):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize('value', [None, 3, ['x.pth']])
def test_not_a_path(value):
    with pytest.raises(DistillError, match=r'teacher\.checkpoint must be the path'):
        load_checkpoint(value)


@pytest.mark.parametrize('content', [{}, dict(state_dict={}), dict(epoch=3), [1, 2], dict(state_dict=dict(a=1))])
def test_no_weights(tmp_path, content):
    path = save(tmp_path, content)
    with pytest.raises(DistillError, match='holds no weights'):
        find_weights(load_checkpoint(path), path)


def test_safetensors(tmp_path):
    """What timm's hub serves."""
    safetensors = pytest.importorskip('safetensors.torch')
    path = tmp_path / 'model.safetensors'
    weights = {'fc.weight': torch.randn(2, 3), 'fc.bias': torch.zeros(2)}
    safetensors.save_file(weights, path)
    found, _ = find_weights(load_checkpoint(str(path)), str(path))
    assert set(found) == set(weights) and all(torch.equal(found[k], v) for k, v in weights.items())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DistillError, match=r'model\.safetensors.*is not a readable safetensors file'):
        load_checkpoint(str(path))
    with pytest.raises(DistillError, match=r"does not exist; in '.*': .*'model\.safetensors'"):
        load_checkpoint(str(tmp_path / 'modle.safetensors'))
