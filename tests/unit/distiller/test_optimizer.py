"""The adapters' optimizer: as if student and adapters had one, without the student's knowing."""

import copy
import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from kd_plugins.distiller import AdapterBank, AdapterOptimizer
from kd_plugins.errors import DistillError
from tests.unit.distiller import two_ranks

INF = float('inf')
OPTIMIZERS = {
    'sgd': lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, **o),
    'adamw': lambda p, **o: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, **o),
    'rmsprop': lambda p, **o: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True, **o),
    'nadam': lambda p, **o: torch.optim.NAdam(p, lr=0.01, **o),
    'radam': lambda p, **o: torch.optim.RAdam(p, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1, **o),
    'adamax': lambda p, **o: torch.optim.Adamax(p, lr=0.01, **o),
    'adagrad': lambda p, **o: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1, **o),
    'fused': lambda p, **o: torch.optim.Adam(p, lr=0.01, fused=True, **o),
}


class Run:
    """A student and two terms' adapters on fixed data."""

    def __init__(self, names=('neck', 'head')):
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
        parts = {
            'neck': nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
            'head': nn.ModuleDict({'adapters': nn.Linear(2, 3)}),
        }
        self.bank = AdapterBank()
        for name in names:
            self.bank.add_module(name, parts[name])
        self.data = torch.randn(12, 6, 2)

    def loss(self, step, weight=1.0, own=True):
        feature = self.student[0](self.data[step])
        output = self.student[1](feature)
        task = output.square().mean()
        if not own:
            return task
        neck, head = self.bank.neck(feature), self.bank.head['adapters'](output)
        return task + weight * ((neck - 1).square().mean() + (head + 1).square().mean())

    def weights(self, own=True):
        parts = {'student': self.student, **({'bank': self.bank} if own else {})}
        return {f'{n}.{k}': v.clone() for n, part in parts.items() for k, v in part.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    assert not [k for k, v in one.items() if not torch.equal(v, other[k])]


def both(make):
    """A run with a single optimizer for student and adapters, and one with two."""
    joint, apart = Run(), Run()
    single = make([*joint.student.parameters(), *joint.bank.parameters()])
    student = make(apart.student.parameters())
    return joint, single, apart, student


# ------------------------------------------------------------------ the same as one optimizer
@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_equals_one_optimizer_with_a_schedule(kind):
    joint, single, apart, student = both(OPTIMIZERS[kind])
    own = AdapterOptimizer(apart.bank, student)
    assert type(own.own) is type(single) and str(own) == f"{type(single).__name__} (options of the student's)"
    for run, optimizer in ((joint, single), (apart, student)):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.1, 0.5, 1, 2][min(step, 3)])
        for step in range(6):
            # Momentum and weight decay are scheduled too.
            for group in optimizer.param_groups:
                group.update({k: group[k] * 0.9 for k in ('momentum', 'weight_decay') if k in group})
            run.loss(step).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    same(joint.weights(), apart.weights())
    assert own.steps == 6
    expected = single.state[next(iter(joint.bank.parameters()))]
    found = own.own.state[next(iter(apart.bank.parameters()))]
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(found[k])) for k, v in expected.items())


@pytest.mark.parametrize('kind', ['sgd', 'adamw'])
@pytest.mark.parametrize('first', [False, True], ids=['zeroed after the step', 'zeroed before backward'])
def test_equals_one_optimizer_with_accumulation(kind, first):
    joint, single, apart, student = both(OPTIMIZERS[kind])
    own = AdapterOptimizer(apart.bank, student)
    for run, optimizer in ((joint, single), (apart, student)):
        for step in range(3):
            if first:
                optimizer.zero_grad()
            for part in range(2):
                run.loss(2 * step + part).backward()
            optimizer.step()
            if not first:
                optimizer.zero_grad()
    same(joint.weights(), apart.weights())
    assert own.steps == 3


def test_a_closure_is_evaluated_before_the_step():
    joint, single, apart, student = both(OPTIMIZERS['sgd'])
    AdapterOptimizer(apart.bank, student)
    for run, optimizer in ((joint, single), (apart, student)):
        for step in range(3):

            def closure(run=run, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = run.loss(step)
                loss.backward()
                return loss

            optimizer.step(closure)
    same(joint.weights(), apart.weights())


@pytest.mark.parametrize('clip', [0.1, lambda parameters: clip_grad_norm_(parameters, 0.1)], ids=['norm', 'function'])
def test_clipped_on_their_own_norm(clip):
    joint, single, apart, student = both(OPTIMIZERS['sgd'])
    AdapterOptimizer(apart.bank, student, clip=clip)
    for step in range(4):
        joint.loss(step).backward()
        norms = [clip_grad_norm_(part.parameters(), 0.1) for part in (joint.student, joint.bank)]
        assert min(norms) > 0.1
        single.step()
        single.zero_grad()
        apart.loss(step).backward()
        # All that a framework does.
        clip_grad_norm_(apart.student.parameters(), 0.1)
        student.step()
        student.zero_grad()
    same(joint.weights(), apart.weights())


def test_gradients_zeroed_behind_the_optimizers_back():
    """Loops that call `zero_grad` of the model: a step uses the adapters' gradients up."""
    joint, single, apart, student = both(OPTIMIZERS['sgd'])
    AdapterOptimizer(apart.bank, student)
    for step in range(4):
        joint.loss(step).backward()
        single.step()
        single.zero_grad()
        apart.loss(step).backward()
        student.step()
        apart.student.zero_grad()
    same(joint.weights(), apart.weights())


def test_adapters_without_gradient_stay():
    """Off: no decay, no momentum, as for any parameter without a gradient."""
    run = Run()
    student = OPTIMIZERS['adamw'](run.student.parameters())
    own = AdapterOptimizer(run.bank, student)
    before = run.bank.export_state()
    run.loss(0, own=False).backward()
    student.step()
    same(before, run.bank.export_state())
    assert own.steps == 1 and not own.own.state


@pytest.mark.parametrize('kind', ['sgd', 'adamw', 'fused'])
def test_weight_zero_is_the_plain_run(kind):
    plain, apart = Run(), Run()
    optimizers = [OPTIMIZERS[kind](run.student.parameters()) for run in (plain, apart)]
    AdapterOptimizer(apart.bank, optimizers[1], clip=1.0)
    for step in range(4):
        for run, optimizer in zip((plain, apart), optimizers, strict=True):
            run.loss(step, weight=0.0, own=run is apart).backward()
            optimizer.step()
            optimizer.zero_grad()
    same(plain.weights(own=False), apart.weights(own=False))
    one, other = (o.state_dict() for o in optimizers)
    assert one['param_groups'] == other['param_groups'] and one['state'].keys() == other['state'].keys()


# ------------------------------------------------------------------ which options
def groups(*specs):
    """Groups of ``(elements, options)``."""
    return [dict(params=[nn.Parameter(torch.ones(n))] if n else [], **options) for n, options in specs]


@pytest.mark.parametrize(
    ('specs', 'lr', 'decay'),
    [
        # A stem with a smaller rate first, then weights and norms with the optimizer's own.
        ([(90, dict(lr=0.01)), (5, dict(weight_decay=0.0)), (9, {}), (3, dict(lr=0.5))], 0.1, 0.02),
        # Nobody has the optimizer's own rate; the first group is empty, the second has a rate for new heads.
        ([(0, dict(lr=0.3)), (8, dict(lr=0.3)), (5, dict(lr=0.2)), (6, dict(lr=0.2))], 0.2, 0.02),
        # Layers of a backbone, each its own group, together outweigh.
        ([(3, dict(lr=0.3)), (2, dict(lr=0.2)), (2, dict(lr=0.2))], 0.2, 0.02),
        ([(3, {})], 0.1, 0.02),
    ],
)
def test_options_are_those_of_most_plain_weights(specs, lr, decay):
    student = torch.optim.SGD(groups(*specs), lr=0.1, weight_decay=0.02, momentum=0.9)
    own = AdapterOptimizer(Run().bank, student)
    group = own.own.param_groups[0]
    assert (group['lr'], group['weight_decay'], group['momentum']) == (lr, decay, 0.9)


def test_the_group_is_found_during_warm_up():
    student = torch.optim.SGD(groups((5, {}), (9, dict(lr=0.01))), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(student, lambda step: 0.1)
    assert student.param_groups[0]['lr'] == pytest.approx(0.01)
    own = AdapterOptimizer(Run().bank, student)
    for parameter in own.bank.parameters():
        parameter.grad = torch.ones_like(parameter)
    student.step()
    assert own.own.param_groups[0]['lr'] == student.param_groups[0]['lr']


class Halves(torch.optim.SGD):
    """Can do something to matrices only, in groups that ask for it: as Ultralytics' MuSGD."""

    def __init__(self, params, lr=1e-3, momentum=0.0, nesterov=False, matrices=False, share=0.5):
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov)
        self.share = share
        for group in self.param_groups:
            group.setdefault('matrices', matrices)

    def step(self, closure=None):
        assert all(p.dim() == 2 for g in self.param_groups if g['matrices'] for p in g['params'])
        return super().step(closure)


class Matrices(torch.optim.SGD):
    """Takes matrices only: as torch's Muon."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr=lr)
        assert all(p.dim() == 2 for g in self.param_groups for p in g['params'])


def test_options_that_do_not_suit_adapters_are_left_out():
    weights = [nn.Parameter(torch.ones(2, 2))]
    student = Halves([dict(params=weights, lr=0.1, momentum=0.8, nesterov=True, matrices=True)], share=0.2)
    own = AdapterOptimizer(Run().bank, student)
    assert type(own.own) is Halves and str(own) == "Halves (schedule of the student's)"
    group = own.own.param_groups[0]
    assert (group['lr'], group['momentum'], group['nesterov'], group['matrices']) == (0.1, 0.8, False, False)
    bank = AdapterBank()
    bank.add_module('flat', nn.Linear(2, 2, bias=False))
    own = AdapterOptimizer(bank, student)
    assert own.own.param_groups[0]['matrices'] and own.own.share == 0.2


@pytest.mark.parametrize(
    'make', [lambda p: Matrices(p, lr=0.4), lambda p: torch.optim.LBFGS(p, lr=0.4)], ids=['matrices', 'closure']
)
def test_another_kind_where_the_students_cannot_train_them(make):
    run = Run()
    student = make([nn.Parameter(torch.ones(2, 2))])
    own = AdapterOptimizer(run.bank, student)
    assert type(own.own) is torch.optim.AdamW
    assert str(own) == f"AdamW (schedule of the student's {type(student).__name__}, which cannot train them)"
    student.param_groups[0]['lr'] = 0.1
    before = run.bank.export_state()
    for parameter in run.bank.parameters():
        parameter.grad = torch.ones_like(parameter)
    student.step(lambda: torch.zeros((), requires_grad=True))
    # A quarter of its own rate, as the student's is of what it began with.
    assert own.own.param_groups[0]['lr'] == pytest.approx(1e-3 / 4)
    torch.testing.assert_close(before['neck.0.bias'] - 1e-3 / 4, run.bank.neck[0].bias.detach())


class Around(torch.optim.Optimizer):
    """Holds the optimizer that does the work, and leaves torch's constructor out: as timm's Lookahead."""

    def __init__(self, inner):
        self.inner, self.defaults, self.param_groups = inner, inner.defaults, inner.param_groups
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

    def step(self, closure=None):
        return self.inner.step(closure)


def test_an_optimizer_around_another():
    run = Run()
    student = Around(torch.optim.SGD(run.student.parameters(), lr=0.1))
    own = AdapterOptimizer(run.bank, student)
    go(run, student, range(3))
    assert own.steps == 3 and type(own.own) is torch.optim.AdamW


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(DistillError, match=r'\(object\) is no torch.optim.Optimizer.*adapter=None'):
        AdapterOptimizer(Run().bank, object())


# ------------------------------------------------------------------ loss scaling
def scaled(run, optimizer, scaler, adapters, bad, clip=None):
    """Some steps; in step 1 a gradient of the student, in step 3 one of the adapters is infinite."""
    for step in range(6):
        scaler.scale(run.loss(step)).backward()
        for number, weight in ((1, run.student[0].weight), (3, run.bank.neck[0].weight)):
            if step == number and bad:
                weight.grad[0, 0] = INF
        if clip is not None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(run.student.parameters(), clip)
        scaler.step(optimizer)
        if adapters is not None and not (step == 1 and bad):
            if clip is not None:
                scaler.unscale_(adapters)
                clip_grad_norm_(run.bank.parameters(), clip)
            scaler.step(adapters)
        scaler.update()
        optimizer.zero_grad()
        if adapters is not None:
            adapters.zero_grad()
        assert all(p.grad is None for p in (*run.student.parameters(), *run.bank.parameters()))
    return scaler.get_scale()


@pytest.mark.parametrize('kind', ['sgd', 'adamw', 'fused'])
@pytest.mark.parametrize('clip', [None, 0.1])
@pytest.mark.parametrize('bad', [False, True], ids=['finite', 'overflow'])
def test_equals_a_second_optimizer_of_one_scaler(kind, clip, bad):
    runs = Run(), Run()
    scalers = [torch.amp.GradScaler('cpu', init_scale=64.0, growth_interval=100) for _ in runs]
    first, second = (OPTIMIZERS[kind](run.student.parameters()) for run in runs)
    own = AdapterOptimizer(runs[1].bank, second, clip=clip, scaler=lambda: scalers[1])
    expected = scaled(runs[0], first, scalers[0], OPTIMIZERS[kind](runs[0].bank.parameters()), bad, clip)
    found = scaled(runs[1], second, scalers[1], None, bad, clip)
    # Halved twice: the scaler has heard of both.
    assert found == expected == (16.0 if bad else 64.0)
    same(runs[0].weights(), runs[1].weights())
    state = own.own.state[runs[1].bank.neck[0].weight]
    if 'step' in state:
        assert state['step'] == (4 if bad else 6)


def test_a_scaler_that_is_off_or_missing():
    joint, single, apart, student = both(OPTIMIZERS['sgd'])
    scalers = [torch.amp.GradScaler('cpu', enabled=False), None]
    own = AdapterOptimizer(apart.bank, student, clip=100.0, scaler=lambda: scalers[own.steps % 2])
    for step in range(4):
        for run, optimizer in ((joint, single), (apart, student)):
            run.loss(step).backward()
            optimizer.step()
            optimizer.zero_grad()
    same(joint.weights(), apart.weights())


def test_a_scaler_and_nothing_to_train():
    run = Run()
    student = OPTIMIZERS['sgd'](run.student.parameters())
    scaler = torch.amp.GradScaler('cpu')
    AdapterOptimizer(run.bank, student, scaler=scaler)
    scaler.scale(run.loss(0, own=False)).backward()
    scaler.step(student)
    scaler.update()


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the values of tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(('kind', 'amp'), [('sgd', False), ('fused', False), ('fused', True)])
def test_the_host_waits_for_nothing(kind, amp):
    run = Run()
    student = OPTIMIZERS[kind](run.student.parameters())
    scaler = torch.amp.GradScaler('cpu', enabled=amp)
    AdapterOptimizer(run.bank, student, clip=1.0, scaler=scaler)
    for step in range(2):
        scaler.scale(run.loss(step)).backward()
        with Waits() as waits:
            scaler.step(student)
            student.zero_grad()
        scaler.update()
        assert waits.count == 0
    with Waits() as waits:
        bool(torch.ones(()) > 0)
    assert waits.count, 'this test sees nothing'


# ------------------------------------------------------------------ the student's optimizer is as it was
def stepped():
    run = Run()
    student = OPTIMIZERS['adamw'](run.student.parameters())
    own = AdapterOptimizer(run.bank, student)
    run.loss(0).backward()
    student.step()
    return run, student, own


def test_state_dicts_copies_and_pickles_of_the_students_optimizer():
    run, student, own = stepped()
    plain = OPTIMIZERS['adamw'](Run().student.parameters())
    state = student.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert state['param_groups'] == plain.state_dict()['param_groups'] and len(state['state']) == 4
    assert list(run.student.state_dict()) == ['0.weight', '0.bias', '1.weight', '1.bias']
    before = run.bank.export_state()
    buffer = io.BytesIO()
    torch.save(student, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(student), pickle.loads(pickle.dumps(student)), torch.load(buffer, weights_only=False)
    for other in copies:
        assert vars(other).keys() == vars(copy.deepcopy(plain)).keys()
        for parameter in (*other.param_groups[0]['params'], *run.bank.parameters()):
            parameter.grad = torch.ones_like(parameter)
        other.step()
        other.zero_grad()
    same(before, run.bank.export_state())
    assert own.steps == 1 and all(p.grad is not None for p in run.bank.parameters())


def test_it_stays_out_of_copies_and_pickles_of_what_holds_it():
    _, _, own = stepped()
    holder = nn.Linear(2, 2)
    holder.register_forward_hook(own._after_step)
    holder.distiller = own
    assert copy.deepcopy(holder).distiller is own and copy.copy(own) is own
    holder._forward_hooks.clear()
    assert pickle.loads(pickle.dumps(holder)).distiller is None


@pytest.mark.parametrize('wrapped', ['before', 'after', None])
def test_close_leaves_no_trace(wrapped):
    run = Run()
    student = OPTIMIZERS['sgd'](run.student.parameters())
    calls = []

    def wrap():
        inner = student.zero_grad
        student.zero_grad = lambda: (calls.append(1), inner())

    if wrapped == 'before':
        wrap()
    before = dict(vars(student))
    own = AdapterOptimizer(run.bank, student)
    if wrapped == 'after':
        wrap()
    student.zero_grad()
    own.close()
    if wrapped != 'after':
        assert vars(student) == before
    assert not student._optimizer_step_post_hooks
    saved = run.bank.export_state()
    run.loss(0).backward()
    saved.update({k: v for k, v in run.bank.export_state().items() if 'running' in k or 'tracked' in k})
    student.step()
    student.zero_grad()
    same(saved, run.bank.export_state())
    assert all(p.grad is None for p in run.student.parameters())
    assert all(p.grad is not None for p in run.bank.parameters())
    assert len(calls) == (2 if wrapped else 0)
    own.close()


# ------------------------------------------------------------------ resume
def go(run, optimizer, steps):
    for step in steps:
        run.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize('kind', ['sgd', 'adamw', 'rmsprop', 'adagrad', 'fused'])
def test_resumed_in_the_middle(kind):
    whole = Run()
    student = OPTIMIZERS[kind](whole.student.parameters())
    AdapterOptimizer(whole.bank, student)
    go(whole, student, range(8))

    begun = Run()
    student = OPTIMIZERS[kind](begun.student.parameters())
    own = AdapterOptimizer(begun.bank, student)
    go(begun, student, range(4))
    buffer = io.BytesIO()
    saved = own.state()
    torch.save(dict(model=begun.student.state_dict(), optimizer=student.state_dict(), own=saved), buffer)
    kept = copy.deepcopy(saved)
    go(begun, student, range(4, 8))
    assert str(saved) == str(kept), 'what was saved must not change any more'
    buffer.seek(0)
    file = torch.load(buffer, weights_only=True)

    # With the terms in another order, and other adapters to begin with.
    again = Run(names=('head', 'neck'))
    student = OPTIMIZERS[kind](again.student.parameters())
    with torch.no_grad():
        for parameter in again.bank.parameters():
            parameter.add_(1)
    own = AdapterOptimizer(again.bank, student)
    again.student.load_state_dict(file['model'])
    student.load_state_dict(file['optimizer'])
    own.load_state(file['own'], 'last.pth')
    assert own.steps == 4
    go(again, student, range(4, 8))
    same(whole.weights(), dict(sorted(again.weights().items(), key=lambda item: list(whole.weights()).index(item[0]))))
    assert str(file['own']) == str(kept), 'what was loaded must not change with the run'


def test_another_learning_rate_after_resume():
    """The options are the student's of now: they do not come from the file."""
    _, _, own = stepped()
    state = own.state()
    run = Run()
    student = torch.optim.AdamW(run.student.parameters(), lr=0.5)
    own = AdapterOptimizer(run.bank, student)
    own.load_state(state, 'last.pth')
    go(run, student, [1])
    assert own.own.param_groups[0]['lr'] == 0.5


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda s: s['adapters'].pop('neck.0.bias'), r'saved in last.pth are not those of this config \(neck.0.bias\)'),
        (lambda s: s.update(kind='SGD'), "saved in last.pth is 'SGD' and this run's is 'AdamW'"),
        (lambda s: s.pop('kind'), "is None and this run's is 'AdamW'"),
    ],
)
def test_a_state_of_something_else_is_refused(edit, message):
    run, _, own = stepped()
    state, before = own.state(), run.bank.export_state()
    state['adapters']['head.adapters.bias'].add_(1)
    edit(state)
    with pytest.raises(DistillError, match=message) as caught:
        own.load_state(state, 'last.pth')
    assert len(str(caught.value)) < 400
    same(before, run.bank.export_state())


# ------------------------------------------------------------------ several ranks
def test_two_ranks_are_one_process_on_the_joint_batch(tmp_path):
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(Path(__file__).parents[3])}
    command = [sys.executable, two_ranks.__file__, str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    zero, one = (torch.load(tmp_path / str(rank)) for rank in range(2))
    same(zero['state']['adapters'], one['state']['adapters'])
    for name, state in zero['state']['optimizer'].items():
        same(state, one['state']['optimizer'][name])
    single = two_ranks.train()
    assert zero['scale'] == one['scale'] == single['scale'] == 8.0
    for key in ('adapters', 'optimizer'):
        torch.testing.assert_close(zero['state'][key], single['state'][key], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(zero['student']), dict(single['student']), rtol=1e-4, atol=1e-6)
    # Off and overflowed steps are none, without decay.
    steps = {n: float(s['step']) for n, s in zero['state']['optimizer'].items()}
    assert set(steps.values()) == {two_ranks.STEPS - len(two_ranks.OFF) - 1}
