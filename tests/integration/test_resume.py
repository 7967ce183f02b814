"""Promise 16: a run that was killed in mid-epoch resumes with adapters, schedule position and EMA."""

import copy
import os
import signal

import pytest
import torch

from kd_plugins.errors import DistillError
from tests.integration.lab import FEATURES, LOGITS, Probe, difference, distill_hook, weights

# An epoch has 4 iterations; it dies in the second epoch and resumes from the end of the first.
KILLED_AT = 6
RAMP = dict(type='linear', start=0.5, end=2.0)
TERMS = dict(features={**FEATURES, 'weight': RAMP}, logits={**LOGITS, 'weight': RAMP})


def config_of(lab):
    # Flips are drawn from a generator that MMEngine does not restore: off, so that the plain run resumes exactly.
    config = lab.plain(train_cfg__max_epochs=3, default_hooks__checkpoint__interval=1)
    config.train_dataloader.dataset.pipeline[3].prob = 0.0
    return config


def read(path):
    return torch.load(path, map_location='cpu', weights_only=False)


def test_the_framework_itself_resumes_exactly(lab):
    """The measure for the test below: what MMEngine promises without us."""
    config = config_of(lab)
    whole = lab.train(config)

    def die(runner):
        if runner.iter + 1 == KILLED_AT:
            raise KeyboardInterrupt

    config = copy.deepcopy(config)
    config.work_dir += '_killed'
    with pytest.raises(KeyboardInterrupt):
        lab.train(config, Probe(die))
    config.resume, config.experiment_name = True, config.experiment_name + '_resumed'
    assert difference(weights(whole), weights(lab.train(config))) == {}


def test_resume_after_sigkill_equals_the_uninterrupted_run(lab):
    config = lab.model_form(config_of(lab), lab.teacher(), TERMS)
    logs = Probe()
    whole = lab.train(config, logs)

    killed = copy.deepcopy(config)
    killed.work_dir += '_killed'
    killed.custom_imports = dict(imports=['tests.integration.child_hooks'], allow_failed_imports=False)
    killed.custom_hooks.append(dict(type='KillAt', iteration=KILLED_AT))
    path = lab.dump(killed, 'killed.py')
    died = lab.run('tools/train.py', path, check=False)
    assert died.returncode == -signal.SIGKILL, died.stdout[-2000:]
    assert sorted(f for f in os.listdir(killed.work_dir) if f.endswith('.pth')) == ['epoch_1.pth']

    resumed = copy.deepcopy(killed)
    out = os.path.join(killed.work_dir, 'dump')
    resumed.custom_hooks[-1] = dict(type='Dump', path=out)
    lab.run('tools/train.py', lab.dump(resumed, 'resumed.py'), '--resume')
    again = read(out + '0')

    assert again['iterations'] == list(range(4, 12)), 'it did not continue from the end of the first epoch'
    # Schedule position: the ramp's value enters the logged losses.
    assert again['logs'] == logs.logs[4:]
    assert again['logs'][0]['loss_kd_features'] > 0
    bank = distill_hook(whole).session.bank.export_state()
    assert set(again['adapters']) == set(bank)
    assert all(torch.equal(again['adapters'][k], bank[k]) for k in bank)
    assert difference(weights(whole), again['weights']) == {}
    last = read(os.path.join(killed.work_dir, 'epoch_3.pth'))
    assert all(torch.equal(last['kd_plugins']['adapters'][k], bank[k]) for k in bank)


def test_resume_from_a_plain_checkpoint_is_refused_in_the_model_form(lab):
    config = lab.plain()
    plain = lab.train(config)
    config = lab.model_form(config, lab.teacher())
    config.resume, config.load_from = True, os.path.join(plain.work_dir, 'epoch_1.pth')
    with pytest.raises(DistillError, match=r'holds no adapters.*load_from'):
        lab.train(config)
