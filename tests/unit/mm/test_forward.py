"""Running just the modules that are tapped, and what a path to a list of modules means."""

import pytest
import torch
from torch import nn

from kd_plugins.distiller import Capture, Tap
from kd_plugins.errors import DistillError
from kd_plugins.mm.forward import openmmlab_tap, run_modules


class Stage(nn.Module):
    def forward(self, features):
        return features + 1


class Refining(nn.Module):
    def forward(self, features, prev_output):
        return features + prev_output


class Sampling(nn.Module):
    def forward(self, features, points, more):
        raise AssertionError('must not run')


class Segmentor(nn.Module):
    def __init__(self, *stages, auxiliary=None):
        super().__init__()
        self.backbone = nn.Identity()
        self.decode_head = nn.ModuleList(stages) if len(stages) > 1 else stages[0]
        if auxiliary is not None:
            self.auxiliary_head = auxiliary

    def extract_feat(self, inputs):
        return self.backbone(inputs)


def outputs(model, *paths):
    with Capture(model, paths, 'student') as capture:
        run_modules(model, torch.ones(1), None, paths)
    return [capture.call(path).output.item() for path in paths]


def test_stages_of_a_cascade_are_fed_with_the_one_before():
    assert outputs(Segmentor(Stage(), Refining(), Refining()), 'decode_head.2', 'decode_head.0') == [4.0, 2.0]


def test_later_stages_than_needed_do_not_run():
    assert outputs(Segmentor(Stage(), Sampling()), 'decode_head.0') == [2.0]


def test_auxiliary_heads_run_although_the_model_itself_skips_them():
    model = Segmentor(Stage(), auxiliary=nn.ModuleList([Stage(), Stage()]))
    assert outputs(model, 'auxiliary_head.1', 'decode_head') == [2.0, 2.0]


def test_a_head_that_needs_more_than_features_is_refused():
    with pytest.raises(DistillError, match=r'decode_head \(Sampling\) cannot be run on features alone'):
        outputs(Segmentor(Sampling()), 'decode_head')


def test_the_decode_head_of_a_cascade_is_its_last_stage():
    model = Segmentor(Stage(), Refining())
    assert openmmlab_tap(model, Tap('decode_head'), 'student') == Tap('decode_head.1')
    assert openmmlab_tap(model, Tap('decode_head.0'), 'student') == Tap('decode_head.0')
    assert openmmlab_tap(Segmentor(Stage()), Tap('decode_head'), 'student') == Tap('decode_head')


def test_another_list_of_modules_is_refused():
    model = Segmentor(Stage(), auxiliary=nn.ModuleList([Stage(), Stage()]))
    with pytest.raises(DistillError, match=r"teacher 'auxiliary_head' is a list of 2 modules.*'auxiliary_head.0'"):
        openmmlab_tap(model, Tap('auxiliary_head'), 'teacher')
