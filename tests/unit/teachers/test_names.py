"""Names in a file against the model's own: beginnings are taken off, or the choice is named."""

import itertools
from collections import OrderedDict

import pytest
import torch
from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.teachers import find_weights, load_strictly, match_names


def network(seed=0, classes=3, width=4):
    torch.manual_seed(seed)
    layers = dict(stem=nn.Conv2d(3, width, 1), norm=nn.BatchNorm2d(width), head=nn.Linear(width, classes))
    return nn.Sequential(OrderedDict(layers))


def under(prefix, net):
    return {prefix + k: v for k, v in net.state_dict().items()}


def load(content, model=None, prefix=None, **options):
    """A network with the weights of a file's content, and what is noted."""
    model = network(9) if model is None else model
    weights = match_names(model, find_weights(content, 'x.pth', prefix=prefix), 'x.pth', **options)
    load_strictly(model, weights.state, 'x.pth')
    return model, weights.notes


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


NET, OTHER = network(1), network(2)
COMPILED = {k.replace('stem.', 'stem._orig_mod.'): v for k, v in NET.state_dict().items()}


@pytest.mark.parametrize(
    'content',
    [
        NET.state_dict(),
        under('module.', NET),
        under('module._orig_mod.', NET),
        under('_orig_mod.module.', NET),
        under('_orig_mod.', NET),
        COMPILED,
        dict(state_dict={**under('model.', NET), 'criterion.weight': torch.ones(3), 'metric.total': torch.ones(())}),
        dict(state_dict={**under('net.', NET), 'ema.decay': torch.ones(())}),
        dict(state_dict={**under('module.', NET), 'steps': torch.tensor(3)}),
        dict(model_ema={**under('module.', NET), 'n_averaged': torch.tensor(3)}, model=OTHER.state_dict()),
        {**under('teacher.', NET), **under('student.', network(3, width=2))},
        {**under('backbone.', NET), **under('decoder.', nn.Linear(2, 2))},
        dict(net=NET.state_dict(), discriminator=nn.Linear(2, 2).state_dict(), epoch=3),
    ],
)
def test_the_models_own_part_is_found(content):
    model, _ = load(content)
    assert equal(model, NET)


def test_real_wrappers():
    """What the wrappers themselves write."""
    average = torch.optim.swa_utils.AveragedModel(NET)
    for wrapped in (nn.DataParallel(NET), average, torch.compile(NET, backend='eager')):
        assert set(wrapped.state_dict()) & set(NET.state_dict()) == set()
        assert equal(load(wrapped.state_dict())[0], NET)


def test_what_was_taken_off_and_left_out_is_said():
    assert load(NET.state_dict())[1] == ()
    assert load(under('module.', NET))[1] == ("names in the file begin with 'module.'",)
    _, notes = load({**under('model.', NET), **under('loss.', nn.Linear(2, 2)), 'steps': torch.ones(())})
    assert notes == ("names in the file begin with 'model.'; 3 others are left out (loss.weight, loss.bias, ...)",)


@pytest.mark.parametrize(
    'starts', [('student.', 'teacher.'), ('model.', 'model_ema.module.'), ('', 'ema.'), ('a.', 'b.')]
)
@pytest.mark.parametrize('entry', [None, 'state_dict'])
def test_two_of_a_kind_are_for_the_user_to_choose(starts, entry):
    state = {**under(starts[0], NET), **under(starts[1], OTHER)}
    content = state if entry is None else {entry: state}
    message = rf"x\.pth' holds 2 sets of weights that fit Sequential.*checkpoint_prefix='{max(starts)}'"
    with pytest.raises(DistillError, match=message) as error:
        load(content)
    assert len(str(error.value)) < 400 and all(repr(s) in str(error.value) for s in starts)
    for start, net in zip(starts, (NET, OTHER), strict=True):
        assert equal(load(content, prefix=start)[0], net)


def test_entries_of_unknown_names_are_a_choice_too():
    content = dict(net=NET.state_dict(), ema_net=OTHER.state_dict())
    with pytest.raises(DistillError, match=r"begin with 'ema_net\.', 'net\.'; say which"):
        load(content)
    assert equal(load(content, prefix='ema_net.')[0], OTHER)


def test_what_the_user_allows_is_no_choice():
    state = {**NET.state_dict(), **under('teacher.', OTHER)}
    weights = match_names(network(9), find_weights(state, 'x.pth'), 'x.pth', ignore=['teacher'])
    report = load_strictly(network(9), weights.state, 'x.pth', allow_unexpected=['teacher'])
    assert len(report.unexpected) == len(OTHER.state_dict())


def test_a_model_that_has_the_names_itself():
    pair = nn.ModuleDict(dict(student=network(3), teacher=network(4)))
    model, notes = load(pair.state_dict(), nn.ModuleDict(dict(student=network(5), teacher=network(6))))
    assert equal(model, pair) and notes == ()


def test_another_number_of_classes_is_seen_behind_the_beginning():
    with pytest.raises(DistillError, match=r'head\.weight is \(5, 4\) in the file and \(3, 4\) in the model'):
        load(under('module.', network(classes=5)))


def test_a_part_that_is_not_complete_is_refused():
    state = under('module.', NET)
    del state['module.head.bias']
    with pytest.raises(DistillError, match=r'1 of 9 keys missing \(head\.bias\)'):
        load(state)
    with pytest.raises(DistillError, match=r'1 of 10 keys unexpected \(extra\)'):
        load({**under('module.', NET), 'module.extra': torch.ones(1)})


def test_a_strange_file_is_named_as_it_is():
    with pytest.raises(DistillError, match=r'another architecture') as error:
        load({f'{p}.0.weight': torch.ones(1) for p in 'abc'})
    assert 'a.0.weight' in str(error.value)


# ------------------------------------------------------------------ old names
class Renamed(nn.Module):
    """As heads of mmdet do: names of before its first version are brought to today's while it loads."""

    _version = 1

    def __init__(self):
        super().__init__()
        self.conv_cls = nn.Linear(2, 2)
        self.conv_reg = nn.Linear(2, 2)

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get('version') is None:
            for key in [k for k in state if k.startswith(prefix)]:
                state[key.replace('old_', 'conv_').replace('conv_cls_of_today', 'broken')] = state.pop(key)
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def renamed():
    return nn.Sequential(OrderedDict(stem=nn.Linear(2, 2), head=Renamed()))


def old(model):
    return {k.replace('conv_', 'old_'): v for k, v in model.state_dict().items()}


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_old_names_are_converted_by_the_module(prefix):
    source, target = renamed(), renamed()
    state = {prefix + k: v for k, v in old(source).items()}
    weights = match_names(target, find_weights(state, 'x.pth'), 'x.pth')
    report = load_strictly(target, weights.state, 'x.pth')
    assert equal(target, source) and len(report.converted) == 4
    assert report.notes()[0].startswith(
        "4 old names of the file converted by the model's own code: head.old_cls.weight"
    )


def test_after_the_conversion_the_load_is_as_strict():
    for change, message in (
        (lambda s: s.pop('head.old_cls.bias'), r'1 of 6 keys missing \(head\.conv_cls\.bias\)'),
        (lambda s: s.update({'head.old_x.bias': torch.ones(2)}), r'1 of 7 keys unexpected \(head\.conv_x\.bias\)'),
        (
            lambda s: s.update({'head.old_cls.bias': torch.ones(7)}),
            r'head\.conv_cls\.bias is \(7,\) in the file and \(2,',
        ),
    ):
        target = renamed()
        before = {k: v.clone() for k, v in target.state_dict().items()}
        state = old(renamed())
        change(state)
        with pytest.raises(DistillError, match=message):
            load_strictly(target, state, 'x.pth')
        assert all(torch.equal(before[k], v) for k, v in target.state_dict().items()), 'half a load took place'


def test_todays_names_without_versions_are_not_taken_for_old_ones():
    class Today(Renamed):
        def __init__(self):
            super().__init__()
            self.conv_cls_of_today = nn.Linear(2, 2)

    source, target = Today(), Today()
    load_strictly(target, dict(source.state_dict()), 'x.pth')
    assert equal(target, source)


def test_no_hook_stays():
    target = network()
    load_strictly(target, NET.state_dict(), 'x.pth')
    with pytest.raises(DistillError):
        load_strictly(target, {}, 'x.pth')
    assert not any(m._load_state_dict_pre_hooks for m in target.modules())


def test_code_that_fails_while_loading_is_one_sentence():
    class Fails(nn.Linear):
        def _load_from_state_dict(self, *given):
            raise AssertionError('version\n' * 99)

    with pytest.raises(DistillError, match=r'cannot be loaded into Fails \(AssertionError: version\)') as error:
        load_strictly(Fails(1, 1), {}, 'x.pth')
    assert len(str(error.value)) < 400


# ------------------------------------------------------------------ names of other code
def test_a_zoos_own_converter_is_asked_where_names_differ():
    def convert(model, state):
        return {k.replace('trunk', 'stem'): v for k, v in state.items()}

    state = {k.replace('stem', 'trunk'): v for k, v in NET.state_dict().items()}
    model, notes = load(state, convert=convert)
    assert equal(model, NET) and 'converted' in notes[0]
    assert load(NET.state_dict(), convert=lambda *given: 1 / 0)[1] == ()
    for broken in (lambda *given: 1 / 0, lambda *given: None, lambda model, state: {}):
        with pytest.raises(DistillError, match=r'missing \(stem\.weight'):
            load(state, convert=broken)


def test_messages_are_short():
    """Of real models: long names, many of them, and a long path."""
    names = [f'backbone.stages.{i}.blocks.{j}.attention.projection' for i, j in itertools.product(range(4), range(9))]
    net = nn.Module()
    for name in names:
        net.register_buffer(name.replace('.', '_'), torch.ones(2))
    path = '/home/somebody/experiments/2024/detection/work_dirs/yolox_l_8xb8-300e_coco/epoch_300.pth'
    own = net.state_dict()
    for state in (
        {k.replace('stages', 'layers'): v for k, v in own.items()},
        {k: torch.ones(3) for k in own},
        {**dict(list(own.items())[:20]), **{k: torch.ones(3) for k in list(own)[20:30]}, 'x' * 60: torch.ones(1)},
    ):
        with pytest.raises(DistillError) as error:
            load_strictly(net, state, path)
        # Of which a path may take a part.
        assert len(str(error.value)) < 400 + len(path) - 40
