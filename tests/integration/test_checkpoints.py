"""Promise 14: what a distilled run saves is what the plain run saves."""

import os
import pickletools
import zipfile

import mmengine.runner.checkpoint as mm
import pytest
import torch

from tests.integration.lab import distill_hook, weights


@pytest.fixture(scope='module')
def files(lab):
    """Checkpoints of a plain run and of both forms: ``{form: (runner, path)}``."""
    config = lab.plain()
    configs = dict(plain=config, hook=lab.hook_form(config, lab.teacher()), model=lab.model_form(config, lab.teacher()))
    runners = {name: lab.train(cfg) for name, cfg in configs.items()}
    return {name: (r, os.path.join(r.work_dir, 'epoch_1.pth')) for name, r in runners.items()}


def read(path):
    return torch.load(path, map_location='cpu', weights_only=False)


def shapes(state):
    return {k: (v.shape, v.dtype) for k, v in state.items()}


@pytest.mark.parametrize('form', ['hook', 'model'])
def test_loads_strictly_into_the_plain_config(lab, files, form):
    path = files[form][1]
    model = lab.build(lab.plain(), seed=3)
    # Strict: MMEngine raises on any missing or unexpected key.
    mm.load_checkpoint(model, path, strict=True)
    expected = {k[len('ema.module.') :]: v for k, v in weights(files[form][0]).items() if k.startswith('ema.module.')}
    loaded = model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in expected.items())


@pytest.mark.parametrize('form', ['hook', 'model'])
def test_same_keys_and_no_trace_of_teacher_or_adapters(files, form):
    plain, distilled = read(files['plain'][1]), read(files[form][1])
    for entry in ('state_dict', 'ema_state_dict'):
        assert list(distilled[entry]) == list(plain[entry])
        assert shapes(distilled[entry]) == shapes(plain[entry])
        assert not [k for k in distilled[entry] if 'teacher' in k or 'adapter' in k or 'kd' in k.split('.')[0]]
    assert set(distilled) - set(plain) == ({'kd_plugins'} if form == 'model' else set())


def test_the_file_of_the_hook_form_has_the_plain_size(files):
    plain, distilled = (os.path.getsize(files[f][1]) for f in ('plain', 'hook'))
    assert distilled == pytest.approx(plain, rel=0.01)


def test_the_model_form_adds_its_adapters_and_their_momentum_only(files):
    plain, distilled = (os.path.getsize(files[f][1]) for f in ('plain', 'model'))
    adapters = sum(p.numel() * 4 for p in distill_hook(files['model'][0]).session.bank.parameters())
    assert distilled - 2 * adapters == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize('form', ['hook', 'model'])
def test_nothing_in_the_file_needs_this_package(lab, files, form):
    """No class of ours is pickled, and a process that cannot import us loads the file."""
    with zipfile.ZipFile(files[form][1]) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith('data.pkl')))
    strings, modules = [], set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == 'GLOBAL':
            modules.add(argument.split()[0])
        elif opcode.name == 'STACK_GLOBAL':
            modules.add(strings[-2])
        elif isinstance(argument, str):
            strings.append(argument)
    assert 'torch._utils' in modules
    assert not [m for m in modules if m.startswith(('kd_plugins', 'tests'))]
    code = (
        "import sys; sys.modules['kd_plugins'] = None\n"
        'import torch; state = torch.load(sys.argv[1], weights_only=False)\n'
        "print('keys', len(state['state_dict']))"
    )
    assert 'keys' in lab.run('-c', code, files[form][1]).stdout


def test_adapters_are_hidden_from_every_state_dict_but_kept_for_resume(files):
    """Both of MMEngine's ways to a state dict, of the model and of its EMA copy."""
    runner, path = files['model']
    saved = read(path)['kd_plugins']['adapters']
    own = dict(distill_hook(runner).session.bank.named_parameters())
    assert own and set(saved) == set(own)
    assert all(torch.equal(saved[k], own[k]) for k in own)
    averaged = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook').ema_model
    for model in (runner.model, averaged):
        for state in (model.state_dict(), mm.get_state_dict(model), model.state_dict(prefix='x.', keep_vars=True)):
            assert not [k for k in state if 'adapter' in k]
    before = {k: v.clone() for k, v in own.items()}
    for load in (runner.model.load_state_dict, lambda s: mm.load_state_dict(runner.model, s, strict=True)):
        load(runner.model.state_dict())
        assert all(torch.equal(before[k], v) for k, v in distill_hook(runner).session.bank.named_parameters())


def test_load_from_starts_the_student_from_a_plain_checkpoint(lab, files):
    """``load_from`` in the model form loads what it loads in the plain config, into student and EMA copy."""
    source = read(files['plain'][1])['state_dict']
    started = {}

    def first(runner):
        started.setdefault('weights', weights(runner))

    from tests.integration.lab import Probe

    config = lab.plain(load_from=files['plain'][1], optim_wrapper__optimizer__lr=0.0)
    lab.train(lab.model_form(config, lab.teacher()), Probe(first))
    parameters = [k for k in source if k.endswith(('weight', 'bias'))]
    assert parameters
    for key in parameters:
        assert torch.equal(started['weights'][f'student.{key}'], source[key])
        assert torch.equal(started['weights'][f'ema.module.{key}'], source[key])
