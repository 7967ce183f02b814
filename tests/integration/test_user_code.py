"""What users bring along: own losses and adapters, own hooks, and the wrong form."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.mm import DistillHook
from tests.integration.lab import FEATURES, LOGITS, Probe, distill_hook


@MODELS.register_module()
class LabCosineLoss(nn.Module):
    """A user's loss, registered where MMEngine users register theirs; autocast and dtypes are not its concern."""

    consumes = 'features'
    seen: list = []

    def forward(self, student, teacher):
        self.seen.append((student.dtype, teacher.dtype, torch.is_autocast_enabled('cpu'), teacher.requires_grad))
        return 1 - torch.cosine_similarity(student, teacher, dim=1).mean()


@MODELS.register_module()
class LabWeightedLoss(nn.Module):
    """A loss with a parameter of its own."""

    consumes = 'features'

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, student, teacher):
        return (self.gain * student - teacher).square().mean()


@MODELS.register_module()
class LabAdapter(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.LazyConv2d(channels, 3, padding=1) if channels is None else nn.Conv2d(16, channels, 3, padding=1)

    def forward(self, student, teacher):
        return self.conv(student)


def test_a_registered_loss_and_adapter_are_found(lab):
    term = dict(FEATURES, loss=dict(type='LabCosineLoss'), adapter=dict(type='LabAdapter', channels=32))
    probe = Probe()
    runner = lab.train(lab.model_form(lab.plain(), lab.teacher(), dict(mine=term)), probe)
    assert all(0 < log['loss_kd_mine'] <= 2 for log in probe.logs)
    adapters = distill_hook(runner).session.bank
    assert sum(p.numel() for p in adapters.parameters()) == 3 * (16 * 32 * 9 + 32)


def test_a_users_loss_gets_full_precision_and_a_detached_teacher(lab):
    LabCosineLoss.seen.clear()
    term = dict(FEATURES, loss=dict(type='LabCosineLoss'))
    config = lab.plain(optim_wrapper__type='Bf16OptimWrapper')
    lab.train(lab.model_form(config, lab.teacher(), dict(mine=term)))
    assert LabCosineLoss.seen
    assert set(LabCosineLoss.seen) == {(torch.float32, torch.float32, False, False)}


def test_a_loss_with_parameters_is_trained(lab):
    """Its parameters are in the bank, hence in the optimizer, the saved adapters and resume, and they move."""
    term = dict(FEATURES, loss=dict(type='LabWeightedLoss'))
    runner = lab.train(lab.model_form(lab.plain(), lab.teacher(), dict(mine=term)))
    distiller = distill_hook(runner).session
    state = distiller.bank.export_state()
    (key,) = [k for k in state if k.endswith('gain')]
    assert distiller.terms['mine'].loss.gain is dict(distiller.bank.named_parameters())[key]
    assert state[key] != 1


@pytest.mark.parametrize('loss', ['LabWeightedLoss', 'FeatureMSELoss'])
def test_the_hook_form_trains_losses_and_adapters(lab, loss):
    """Parameters of a user's loss, and convolutions between other widths."""
    width = {} if loss == 'FeatureMSELoss' else dict(width=4)
    term = dict(loss=dict(type=loss), student='neck', teacher='neck')
    probe = Probe()
    runner = lab.train(lab.hook_form(lab.plain(), lab.teacher(**width), dict(mine=term)), probe)
    assert distill_hook(runner).session.trainable and all(log['loss_kd_mine'] > 0 for log in probe.logs)


def test_the_model_form_without_the_hook_is_refused(lab):
    config = lab.model_form(lab.plain(), lab.teacher())
    config.default_hooks.pop('distill')
    with pytest.raises(DistillError, match='no DistillHook is running; add default_hooks'):
        lab.train(config)


@pytest.mark.parametrize('spelling', ['text', 'class'])
def test_the_hook_in_custom_hooks_is_refused(lab, spelling):
    """There a list in a child config replaces its base's, EMA and all."""
    config = lab.plain()
    kind = 'kd_plugins.DistillHook' if spelling == 'text' else DistillHook
    config.custom_hooks = [dict(type=kind, teacher=lab.teacher(), terms=dict(logits=LOGITS))]
    with pytest.raises(DistillError, match=r'custom_hooks.*default_hooks'):
        lab.train(config)
