"""MMEngine's other ways to train: FlexibleRunner, and models that do without ``forward(mode='loss')``."""

import copy

import pytest
import torch
from mmdet.models import YOLOX
from mmengine.registry import MODELS
from mmengine.runner import FlexibleRunner

from kd_plugins.errors import DistillError
from tests.integration.lab import FEATURES, LOGITS, Probe, distill_hook
from tests.integration.promises import difference

TERMS = dict(logits=LOGITS, features=FEATURES)


def flexible(config, *hooks):
    """The same run by MMEngine's FlexibleRunner, on one device."""
    config = copy.deepcopy(config)
    config.pop('launcher', None)
    runner = FlexibleRunner.from_cfg(config)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner


def config_of(lab, **changes):
    # The two runners wrap optimizers and averages alike, but seed at different moments: nothing here draws numbers.
    config = lab.plain(custom_hooks=[], **changes)
    config.train_dataloader.dataset.pipeline[3].prob = 0.0
    config.train_dataloader.sampler.shuffle = False
    return config


def test_flexible_runner_distils_with_adapters(lab):
    """Logits, a trained adapter in an optimizer of its own, the adapters in the checkpoint."""
    probe = Probe()
    config = lab.hook_form(config_of(lab, default_hooks__checkpoint__interval=1), lab.teacher(), TERMS)
    runner = flexible(config, probe)
    session = distill_hook(runner).session
    assert len(probe.logs) == 4 and session.asked == 4
    assert all(log['loss_kd_logits'] > 0 and log['loss_kd_features'] > 0 for log in probe.logs)
    saved = torch.load(f'{config.work_dir}/epoch_1.pth', map_location='cpu', weights_only=False)
    assert not any('adapter' in key for key in saved['state_dict'])
    kept = saved['kd_plugins']['adapters']
    state = session.bank.export_state()
    assert state and all(torch.equal(kept[key], value) for key, value in state.items())


def test_flexible_runner_at_weight_zero_is_the_plain_run(lab):
    config = config_of(lab)
    none = {name: {**term, 'weight': 0.0} for name, term in TERMS.items()}
    plain, ours = flexible(config), flexible(lab.hook_form(config, lab.teacher(), none))
    assert difference(plain.model.state_dict(), ours.model.state_dict()) == {}


@MODELS.register_module()
class LabOwnStep(YOLOX):
    """A detector whose ``train_step`` calls the loss by itself, e.g. for an optimizer of two steps."""

    def train_step(self, data, optim_wrapper):
        with optim_wrapper.optim_context(self):
            data = self.data_preprocessor(data, True)
            losses = self.loss(data['inputs'], data['data_samples'])
        total, log = self.parse_losses(losses)
        optim_wrapper.update_params(total)
        return log


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_a_train_step_that_the_hook_never_hears_of(lab, form):
    """The run says that it distils, and does not: it stops, with the reason."""
    config = lab.plain()
    config.model.type = 'LabOwnStep'
    probe = Probe()
    with pytest.raises(DistillError, match=r'has a train_step of its own, which does not call self\(\*\*data, mode='):
        lab.train(getattr(lab, form)(config, lab.teacher(), dict(logits=LOGITS)), probe)
    assert len(probe.logs) <= 2, 'in the first iterations'
