"""The benchmark of the dense losses runs on tiny maps and reports what it measured; how fast is not tested here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.lab.benchmark import main
from kd_plugins.lab.benchmark.benchmark import peak_memory
from kd_plugins.lab.benchmark.losses import PLAIN, MapLoss, map_losses
from kd_plugins.lab.benchmark.measure import highest_memory, in_new_process

ROOT = Path(__file__).parents[4]
TINY = ['--shape', '2', '3', '8', '8', '--repeats', '2', '--device', 'cpu']


@pytest.mark.parametrize('name', PLAIN)
def test_what_is_compared_is_equal(name):
    case = MapLoss(loss=name, shape=(2, 3, 4, 5))
    student, teacher = case.maps(case.shape)
    results = []
    for function in case.functions.values():
        value = function(student, teacher)
        results.append((value.detach(), *torch.autograd.grad(value, student)))
    assert len(results) == 2 and results[0][0] > 0
    torch.testing.assert_close(*results)


def test_measures_losses(tmp_path, capsys):
    file = tmp_path / 'figures.json'
    results = main(['--loss', 'pixelwise_kl_div', 'feature_mse', *TINY, '--no-memory', '--json', str(file)])
    dense, features = results
    assert dense['inputs'] == 2 * 4 * 2 * 3 * 8 * 8
    assert all(len(dense['seconds'][name]['all']) == 2 for name in ('ours', 'plain'))
    assert dense['ratio']['aim'] == 1.0 and dense['ratio']['verdict'] in ('met', 'missed', 'undecided')
    assert set(features['seconds']) == {'ours'} and features['ratio'] is None
    assert not any(dense['waiting'].values()), 'the host waits for the GPU'
    shown = capsys.readouterr().out
    assert all(MapLoss.table(result) in shown for result in results)
    assert shown.count('plain formula') == 1 and shown.count('aim <= 1.00') == 1
    assert json.loads(file.read_text())['losses'][0]['ratio'] == dense['ratio']


@pytest.mark.long
@pytest.mark.slow
def test_the_tool_measures_memory_in_processes_of_its_own():
    command = [sys.executable, str(ROOT / 'tools' / 'benchmark.py'), *TINY, '--loss']
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown.startswith('python ') and 'pixelwise_kl_div, forward and backward' in shown
    assert shown.count('peak memory / inputs') == (0 if highest_memory(str, 1, torch.device('cpu')) is None else 2)


@pytest.mark.long
@pytest.mark.slow
def test_peak_memory_of_the_lean_path():
    """256 MiB of inputs: the plain formula holds several maps more than ours."""
    case = MapLoss(loss='pixelwise_kl_div', shape=(2, 64, 512, 512))
    ours, plain = (in_new_process(peak_memory, case, name, None) for name in ('ours', 'plain'))
    if ours is None:
        pytest.skip('resident memory cannot be read on this system')
    assert 1.4 * 2**28 < ours < 2 * 2**28 < 3 * 2**28 < plain


def test_unknown_names_and_numbers_are_refused():
    assert {'pixelwise_kl_div', 'channel_wise_div', 'feature_mse'} <= set(map_losses())
    for args, message in (
        (['--loss', 'pixel_kl_div'], "'pixelwise_kl_div'"),
        (['--loss', 'dkd'], 'not a loss of two maps'),
        (['--loss', '--shape', '2', '3', '0', '8'], 'shape must be at least 1, got 0'),
        (['--loss', '--repeats', '0'], 'repeats must be at least 1'),
    ):
        with pytest.raises(DistillError, match=message):
            main([*args, '--device', 'cpu'])
