"""Reading checkpoints: every common form, nothing executed, clear refusals."""

import collections
import os
import types

import numpy as np
import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.teachers import find_file, find_weights, load_checkpoint

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
        dict(state_dict=WEIGHTS, meta={}, message_hub=dict(scalars=np.float64(1), array=np.arange(3)), odd={1, 2}),
    ],
    ids=['mmengine', 'model', 'bare', 'numpy'],
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


# ------------------------------------------------------------------ which of several
AVERAGED = {k: v + 1 for k, v in WEIGHTS.items()}


@pytest.mark.parametrize('raw, average', [('state_dict', 'state_dict_ema'), ('model', 'model_ema')])
def test_the_average_is_taken_where_timm_takes_it(tmp_path, raw, average):
    timm = pytest.importorskip('timm')
    path = save(tmp_path, {raw: WEIGHTS, average: AVERAGED})
    theirs, found = timm.models.load_state_dict(path), find_weights(load_checkpoint(path), path)
    assert torch.equal(found.state['b'], AVERAGED['b']) and torch.equal(found.state['b'], theirs['b'])
    assert found.notes == (f'weights are {average!r} of the file, not {raw!r}',)
    path = save(tmp_path, {raw: WEIGHTS, average: None})
    theirs, found = timm.models.load_state_dict(path), find_weights(load_checkpoint(path), path)
    assert equal(found.state) and equal(theirs) and found.notes == ()


def test_mmengine_saves_the_average_as_state_dict(tmp_path):
    """What its own hook writes: `ema_state_dict` holds the trained weights, exchanged for the averaged ones."""
    hooks = pytest.importorskip('mmengine.hooks')
    model = torch.nn.Linear(2, 2)
    runner = types.SimpleNamespace(model=model, iter=0, epoch=0)
    hook = hooks.EMAHook(momentum=0.5)
    hook.before_run(runner)
    for _ in range(2):
        torch.nn.init.normal_(model.weight)
        hook.after_train_iter(runner, 0)
    checkpoint = dict(state_dict=dict(model.state_dict()), message_hub=Odd(), meta={})
    hook.before_save_checkpoint(runner, checkpoint)
    path = save(tmp_path, checkpoint)
    found, average = find_weights(load_checkpoint(path), path), hook.ema_model.module.weight
    assert not torch.equal(average, model.weight)
    assert torch.equal(found.state['weight'], average)
    assert found.notes == (
        "weights are the averaged ones: 'state_dict' of a file of MMEngine, whose others are in 'ema_state_dict'",
    )


@pytest.mark.parametrize(
    'content, prefix',
    [
        (dict(student=WEIGHTS, teacher=AVERAGED), 'teacher.'),
        (dict(model=WEIGHTS, ema=dict(module=AVERAGED, updates=3)), 'ema.module.'),
        (dict(state_dict={f'{p}.{k}': v for p, w in (('a', WEIGHTS), ('b', AVERAGED)) for k, v in w.items()}), 'b.'),
        (dict(state_dict={f'b.{k}': v for k, v in AVERAGED.items()}, state_dict_ema=WEIGHTS), 'state_dict.b.'),
    ],
)
def test_a_part_by_name(tmp_path, content, prefix):
    path = save(tmp_path, content)
    found = find_weights(load_checkpoint(path), path, prefix=prefix)
    assert set(found.state) == set(WEIGHTS) and torch.equal(found.state['b'], AVERAGED['b']) and found.chosen
    with pytest.raises(DistillError, match=r"teacher\.checkpoint_prefix='x\.': no name .* begins with it; choose from"):
        find_weights(load_checkpoint(path), path, prefix='x.')


def test_versions_of_modules_are_kept(tmp_path):
    """Modules convert old parameters by them."""
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    for content, prefix, modules in (
        (dict(state_dict=net.state_dict()), None, ['', '0']),
        (dict(state_dict=net.state_dict()), '0.', ['']),
        (dict(net=net.state_dict()), None, ['net', 'net.0']),
        (dict(net=net.state_dict()), 'net.', ['', '0']),
    ):
        path = save(tmp_path, content)
        versions = find_weights(load_checkpoint(path), path, prefix=prefix).state._metadata
        assert list(versions) == modules and versions[modules[-1]]['version'] == 2


# ------------------------------------------------------------------ no weights
@pytest.mark.parametrize('content', [torch.nn.Linear(1, 1), dict(model=torch.nn.Linear(1, 1), epoch=3)])
def test_a_whole_network(tmp_path, content):
    path = save(tmp_path, content)
    with pytest.raises(DistillError, match=r'pickled object.*torch\.save\(model\.state_dict\(\), path\)') as error:
        find_weights(load_checkpoint(path), path)
    assert isinstance(content, torch.nn.Module) or "its entry 'model'" in str(error.value)


def test_an_exported_network(tmp_path):
    path = str(tmp_path / 'x.pth')
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    with pytest.raises(DistillError, match=r'an exported network \(TorchScript\).*dict\(exported='):
        find_weights(load_checkpoint(path), path)


@pytest.mark.parametrize('value', [torch.nn.Linear(1, 1), WEIGHTS, {str(i): torch.ones(99) for i in range(99)}])
def test_weights_instead_of_their_file(value):
    with pytest.raises(DistillError, match=r'must be the path of a file, got .*torch\.save\(') as error:
        load_checkpoint(value)
    assert len(str(error.value)) < 400


# ------------------------------------------------------------------ addresses
def test_downloads_of_one_name_are_kept_apart(tmp_path, monkeypatch):
    """`pytorch_model.bin` is the name of many files."""
    asked = []

    def download(url, target):
        asked.append(url)
        torch.save(dict(state_dict={'w': torch.tensor([len(asked)])}), target)

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    first, second = 'https://a.invalid/x/best.pth?download=1', 'https://a.invalid/y/best.pth?download=1'
    values = [int(load_checkpoint(url)['state_dict']['w']) for url in (first, second, first)]
    assert values == [1, 2, 1] and asked == [first, second]
    load_checkpoint('https://a.invalid/resnet50-0676ba61.pth')
    assert (tmp_path / 'checkpoints' / 'resnet50-0676ba61.pth').exists()  # where torch itself keeps it


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda *given: 1 / 0)
    with pytest.raises(
        DistillError, match=r"'https://a\.invalid/x\.pth' could not be downloaded .*give a local file\.$"
    ):
        load_checkpoint('https://a.invalid/x.pth')


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    path = save(tmp_path, dict(state_dict=WEIGHTS))
    assert find_file('~/x.pth') == path


def test_safetensors(tmp_path):
    """What timm's hub serves."""
    safetensors = pytest.importorskip('safetensors.torch')
    path = tmp_path / 'model.safetensors'
    weights = {'fc.weight': torch.randn(2, 3), 'fc.bias': torch.zeros(2)}
    safetensors.save_file(weights, path)
    found = find_weights(load_checkpoint(str(path)), str(path)).state
    assert set(found) == set(weights) and all(torch.equal(found[k], v) for k, v in weights.items())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DistillError, match=r'model\.safetensors.*is not a readable safetensors file'):
        load_checkpoint(str(path))
    with pytest.raises(DistillError, match=r"does not exist; in '.*': .*'model\.safetensors'"):
        load_checkpoint(str(tmp_path / 'modle.safetensors'))
