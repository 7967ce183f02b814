"""Promise 21: a tap records what a module computed, whatever is done to that tensor afterwards."""

import pytest
import torch
from torch import nn

from kd_plugins.distiller import Capture
from kd_plugins.mm.forward import run_modules
from tests.integration.lab import FEATURES, Probe, distill_hook


def reference(model, path, image):
    """What a module returns, recomputed from its input by a model whose activations are not in place."""
    found = {}
    for module in model.modules():
        if getattr(module, 'inplace', False):
            module.inplace = False
    module = model.get_submodule(path)

    def keep(module, args, output):  # returns nothing: what a hook returns replaces the output
        found.setdefault('value', output.detach().clone())

    handle = module.register_forward_hook(keep)
    with torch.no_grad():
        model.extract_feat(image)
    handle.remove()
    return found['value']


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize(
    ('family', 'path'),
    [
        ('rtmdet', 'backbone.stem.0.bn'),  # ConvModule, in-place SiLU
        ('rtmdet', 'neck.out_convs.0.bn'),
        ('gfl', 'backbone.layer1.0.bn1'),  # ResNet, in-place ReLU
        ('gfl', 'backbone.layer2.1.bn2'),  # in-place addition of the shortcut, then in-place ReLU
        ('yolox', 'backbone.stem.conv.conv'),
    ],
)
def test_in_place_activations_do_not_overwrite_what_was_recorded(lab, family, path, training):
    model = lab.build(lab.plain(family)).train(training)
    with torch.no_grad():
        for parameter in model.parameters():  # residual branches start at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    if family != 'yolox':
        assert any(getattr(m, 'inplace', False) for m in model.modules()), 'nothing is in place: the test is void'
    image = torch.randn(2, 3, 96, 96)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(), Capture(model, [path], 'student') as capture:
        run_modules(model, image, None, [path])
    model.load_state_dict(state)  # BatchNorm in training mode has moved its statistics
    assert torch.equal(capture.call(path).output, reference(model, path, image))


def test_gradient_flows_from_a_tap_under_an_in_place_activation(lab):
    """Training through ``...bn``, which the activation after it overwrites, changes the layers before it."""
    term = dict(loss=dict(type='FeatureMSELoss'), student='neck.out_convs.0.bn', teacher='neck.out_convs.0.bn')
    probe = Probe()
    lab.train(lab.model_form(lab.plain('rtmdet'), lab.teacher('rtmdet'), dict(bn=term)), probe)
    assert all(log['loss_kd_bn'] > 0 for log in probe.logs)


@pytest.mark.parametrize(('family', 'path'), [('yolox', 'bbox_head'), ('gfl', 'bbox_head'), ('rtmdet', 'bbox_head')])
def test_heads_that_are_called_without_hooks_are_recorded(lab, family, path):
    """In tensor mode mmdet calls ``bbox_head.forward``, which no forward hook sees."""
    model = lab.build(lab.plain(family)).eval()
    hits = []
    model.bbox_head.register_forward_hook(lambda *args: hits.append(args))
    with torch.no_grad(), Capture(model, [path], 'teacher') as capture:
        run_modules(model, torch.rand(1, 3, 96, 96), None, [path])
    assert not hits, 'mmdet calls hooks now: taps could be hooks'
    assert len(capture.calls[path]) == 1


def test_what_the_student_computes_does_not_depend_on_being_tapped(lab):
    """Two runs with the same seed whose taps differ, weight 0 on the second tap: equal losses."""
    logs = []
    for extra in ({}, dict(stage=dict(FEATURES, student='backbone.stage2', teacher='backbone.stage2', weight=0.0))):
        probe = Probe()
        runner = lab.train(lab.model_form(lab.plain(), lab.teacher(), dict(features=FEATURES, **extra)), probe)
        logs.append([{k: v for k, v in log.items() if 'stage' not in k} for log in probe.logs])
    assert len(distill_hook(runner).session.student_modules) == 2
    assert logs[0] == logs[1]
    assert isinstance(runner.model, nn.Module)
