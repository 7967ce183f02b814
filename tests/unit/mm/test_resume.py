"""What a checkpoint of a distilled run says of how it goes on."""

import pytest

from kd_plugins.mm.resume import forget, how_to_resume, was_distilled


def checkpoint(hook='', **more):
    return {'meta': {'cfg': f'default_hooks = dict(distill=dict(type="kd_plugins.DistillHook", {hook}))'}, **more}


@pytest.mark.parametrize(
    'hook, words',
    [
        (
            'recipe="cwd", teacher=dict(config="t.py", checkpoint="t.pth")',
            'add --kd cwd --teacher t.py --teacher-checkpoint t.pth',
        ),
        ('recipe="kl", teacher=dict(timm="resnet50", checkpoint=None)', 'add --kd kl --teacher timm::resnet50'),
        (
            'recipe=["kl", "cwd"], teacher=dict(ultralytics="x.pt"), options=dict(weight=3, teacher=dict(a=1))',
            'add --kd kl cwd --teacher x.pt --kd-options weight=3 teacher.a=1',
        ),
        ('recipe="kl", teacher=dict(exported="t.pt2"), stop=3', 'add --kd kl --teacher t.pt2 (and its stop)'),
        ('terms=dict(), teacher=dict(config="t.py")', 'resume it with the config in its folder'),
        ('', 'resume it with the config in its folder'),
    ],
)
def test_what_to_write(hook, words):
    assert was_distilled(checkpoint(hook)) and how_to_resume(checkpoint(hook)).startswith(words)


def test_a_config_that_cannot_be_read_needs_no_more_than_a_sentence():
    broken = {'meta': {'cfg': 'DistillHook = (((\n'}}
    assert was_distilled(broken) and 'the config in its folder' in how_to_resume(broken)


@pytest.mark.parametrize('plain', [{}, {'meta': None}, {'meta': {'cfg': 'model = dict()'}}])
def test_plain_checkpoints_are_plain(plain):
    assert not was_distilled(plain)
    assert was_distilled({**plain, 'kd_plugins': {'adapters': {}}})


def test_only_what_is_gone_is_forgotten():
    names = ('train/loss', 'train/loss_kd_a', 'train/loss_kd_b', 'train/kd_ratio')
    scalars = dict.fromkeys(names)
    forget(scalars, keep=['b'])
    assert list(scalars) == ['train/loss', 'train/loss_kd_b', 'train/kd_ratio']
    forget(scalars)
    assert list(scalars) == ['train/loss']
