"""Stages of a run: what is on in each, and that frozen parts neither move nor are looked at, whatever trains them."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kd_plugins.distiller import Position, Session, build_terms
from kd_plugins.distiller.stages import build_stages
from kd_plugins.errors import DistillError
from kd_plugins.predictions import ClassLogits
from kd_plugins.teachers import FrozenTeacher
from kd_plugins.teachers.run import RunOptions, check_alpha

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.neck = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 5)
        self.logits = ClassLogits(5)

    def forward(self, images):
        return self.logits(self.head(self.neck(self.backbone(images)).mean((2, 3))))


NECK = dict(loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck')
LOGITS = dict(loss=dict(type='KLDivLoss'), student='logits', teacher='logits')


def session_of(stages=None, alpha=None, **terms):
    terms = terms or dict(neck=NECK, logits=LOGITS)
    teacher = FrozenTeacher(Net(1), lambda net, images, *_: net(images), lambda images, _: images, name='net')
    built = build_stages(stages, check_alpha)
    return Session(Net(0), teacher, build_terms(terms), alpha=alpha, stages=built)


class Run:
    """A training loop like a framework's: training mode at the start, clipping, an optimizer with a memory."""

    def __init__(self, session, optimizer, steps, model=None, clip=None, decay=0.1):
        self.session, self.steps, self.clip = session, steps, clip
        student = session.student
        self.model = student if model is None else model
        kinds = dict(adam=torch.optim.AdamW, sgd=lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o))
        self.optimizer = kinds[optimizer](student.parameters(), lr=0.05, weight_decay=decay)
        session.check(IMAGES)
        session.attach(self.optimizer)
        self.said, self.states, self.norms, self.kd = [], [self.state()], [], []

    def state(self):
        return copy.deepcopy(self.session.student.state_dict())

    def __call__(self):
        student = self.session.student
        self.session.begin_run(Position(0, self.steps), self.steps)
        for step in range(self.steps):
            student.train()
            said = self.session.begin_iteration(Position(step, self.steps, step))
            self.said += [said] if said else []
            with self.session.capture() as capture:
                task = nn.functional.cross_entropy(self.model(IMAGES), LABELS)
            kd = self.session.losses(capture, IMAGES, None)
            own = 1 if self.session.alpha is None or not self.session.active else 1 - self.session.alpha
            (task * own + sum(kd.values())).backward()
            if self.clip is not None:
                self.norms.append(nn.utils.clip_grad_norm_(student.parameters(), self.clip).item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.states.append(self.state())
            self.kd.append({name: value.item() for name, value in kd.items()})
        return self

    def moved(self, step, part):
        """Whether anything of a part changed in a step, statistics of normalisation included."""
        before, after = self.states[step], self.states[step + 1]
        return any(not torch.equal(before[k], after[k]) for k in before if k.startswith(part))


@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
def test_what_is_frozen_does_not_move(optimizer):
    """Neither by gradients, nor by weight decay or momentum, nor in the statistics of its normalisation."""
    stages = [dict(until=2, freeze='head'), dict(until=4, freeze=['backbone', 'neck'], terms=['logits']), {}]
    run = Run(session_of(stages), optimizer, 6)()
    parts = ('backbone', 'neck', 'head')
    moved = [[run.moved(step, part) for part in parts] for step in range(6)]
    assert moved == [[True, True, False]] * 2 + [[False, False, True]] * 2 + [[True, True, True]] * 2


@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
def test_an_optimizer_goes_on_with_what_it_left(optimizer):
    """The momentum of frozen parameters is that of their last step, and there is none before their first."""
    run = Run(
        session_of([dict(until=2, freeze='head'), dict(until=4, train=['head'], terms=['logits']), {}]), optimizer, 5
    )
    student = run.session.student
    seen = []

    def look(optimizer, *_):
        of = [optimizer.state.get(p) for p in (student.head.weight, student.neck[0].weight)]
        seen.append(copy.deepcopy([s and {k: v for k, v in s.items() if torch.is_tensor(v)} for s in of]))

    run.optimizer.register_step_post_hook(look)
    run()
    head, neck = zip(*seen, strict=True)
    assert not head[0] and not head[1] and head[2]
    assert neck[1] and all(torch.equal(neck[1][k], neck[3][k]) for k in neck[1])
    assert any(not torch.equal(neck[3][k], neck[4][k]) for k in neck[3])


def test_clipping_sees_what_trains_only():
    session = session_of([dict(until=1, freeze='head'), {}])
    run = Run(session, 'sgd', 2, clip=1e-3)()
    grads = {}
    student = Net(0)
    plain = session_of()
    plain.check(IMAGES)
    plain.begin_iteration(Position(0, 2))
    with plain.capture() as capture:
        task = nn.functional.cross_entropy(plain.student(IMAGES), LABELS)
    (task + sum(plain.losses(capture, IMAGES, None).values())).backward()
    grads = {n: p.grad.norm() for n, p in plain.student.named_parameters()}
    expected = torch.stack([g for n, g in grads.items() if not n.startswith('head')]).norm().item()
    assert run.norms[0] == pytest.approx(expected, rel=1e-5)
    assert run.norms[0] < torch.stack(list(grads.values())).norm().item() and student is not plain.student


def test_stages_choose_terms_and_balance():
    stages = [dict(until=0.25, terms=['neck'], alpha=1), dict(until=0.75, alpha=0.5), dict(terms=[])]
    run = Run(session_of(stages, alpha=0.9), 'sgd', 8)
    asked = []
    run.session.teacher.model.register_forward_hook(lambda *_: asked.append(1))
    before = len(asked)
    run()
    on = [[value > 0 for value in row.values()] for row in run.kd]
    assert on == [[True, False]] * 2 + [[True, True]] * 4 + [[False, False]] * 2
    assert len(asked) - before == 6 and not run.session.teachers, 'released in the stage without terms'
    assert [said.partition(':')[0] for said in run.said] == [f'Stage {i} of 3' for i in (1, 2, 3)]
    assert 'labels only to the end' in run.said[2] and 'the teacher was released' in run.said[2]


def test_with_alpha_1_labels_teach_nothing():
    run = Run(session_of([dict(until=1, terms=['neck'], alpha=1), {}]), 'sgd', 2, decay=0.0)()
    assert not run.moved(0, 'head') and run.moved(0, 'neck') and run.moved(1, 'head')


def test_a_term_freezes_while_it_is_on():
    run = Run(session_of(neck={**NECK, 'stop': 2, 'freeze': ['head']}, logits={**LOGITS, 'start': 2}), 'adam', 4)()
    assert [run.moved(step, 'head') for step in range(4)] == [False, False, True, True]
    assert all(run.moved(step, 'neck') for step in range(4))


def test_train_is_the_rest_of_freeze():
    """Gradual unfreezing from the head down."""
    stages = [dict(until=1, train='head'), dict(until=2, train=['head', 'neck']), {}]
    run = Run(session_of(stages, logits=LOGITS), 'adam', 3)()
    moved = [[run.moved(step, part) for part in ('backbone', 'neck', 'head')] for step in range(3)]
    assert moved == [[False, False, True], [False, True, True], [True, True, True]]


def test_layers_that_the_framework_keeps_in_evaluation_mode_stay_there():
    session = session_of([dict(until=1, freeze='backbone'), {}])
    norm = session.student.backbone[1]
    session.check(IMAGES)
    session.attach(torch.optim.SGD(session.student.parameters(), lr=0.1))
    for step, own in enumerate((False, False)):
        session.student.train()
        norm.train(own)
        session.begin_iteration(Position(step, 2, step))
        assert not norm.training
    session.student.train()
    session.detach()
    assert norm.training and not session.freezer._handles


def test_without_stages_nothing_is_hooked():
    session = session_of()
    optimizer = torch.optim.SGD(session.student.parameters(), lr=0.1)
    session.check(IMAGES)
    session.attach(optimizer)
    session.begin_iteration(Position(0, 2))
    assert not optimizer._optimizer_step_pre_hooks and session.stage is None
    assert not any(p._backward_hooks for p in session.student.parameters())


def test_ddp_needs_no_search_for_unused_parameters(tmp_path):
    """Its reducer waits for the gradient of every parameter that had one when it was built."""
    store = distributed.FileStore(str(tmp_path / 'store'), 1)
    distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        stages = [dict(until=2, freeze='head', alpha=1, terms=['neck']), dict(until=4, freeze='backbone'), {}]
        session = session_of(stages)
        run = Run(session, 'adam', 6, model=DistributedDataParallel(session.student))()
    finally:
        distributed.destroy_process_group()
    alone = Run(session_of(stages), 'adam', 6)()
    for ours, theirs in zip(run.states, alone.states, strict=True):
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_stages_are_said_and_written():
    options = dict(
        teacher=dict(),
        terms=dict(neck=NECK),
        stages=[dict(until=0.3, freeze=['head'], alpha=1), dict(until=0.5, train='neck'), dict(terms=[])],
    )
    run = RunOptions.read(options)
    assert RunOptions.read({k: v for k, v in run.to_dict().items() if v is not None}).stages == run.stages
    session = session_of(options['stages'], neck=NECK)
    assert session.schedule('epoch', 10) == (
        'from epoch 0 to the end (of 10); stages: (1) all terms, head frozen, alpha 1 until 0.3 of the run; (2) all '
        'terms, only neck trains until 0.5 of the run; (3) labels only to the end'
    )


@pytest.mark.parametrize(
    'stages, message',
    [
        ([], 'stages must be a list such as'),
        ('freeze', 'stages must be a list such as'),
        ([3], r'stages\[0\] must be a mapping'),
        ([dict(untill=3), {}], "no option 'untill'.*'until'"),
        ([{}, {}], r'stages\[0\].until must be an epoch'),
        ([dict(until=0), {}], r'stages\[0\].until must be an epoch'),
        ([dict(until=1.5), {}], r'stages\[0\].until must be an epoch'),
        ([dict(until=True), {}], r'stages\[0\].until must be an epoch'),
        ([dict(until=3)], r'left out of the last stage only; got 3'),
        ([dict(until=3), dict(until=3), {}], r'must ascend from stage to stage, got \[3, 3\]'),
        ([dict(until=0.5), dict(until=3), {}], 'in every stage, or fractions'),
        ([dict(until=3, freeze='head', train='neck'), {}], 'both freeze and train'),
        ([dict(until=3, freeze=3), {}], r'stages\[0\].freeze must be a list of names'),
        ([dict(until=3, alpha=2), {}], r'alpha must be a number in \[0, 1\]'),
        ([dict(until=3, freeze='heat'), {}], r"stages\[0\]: freeze: .*'heat'.*'head'"),
        ([dict(until=3, terms=['nek']), {}], r"stages\[0\].terms: there is no term 'nek': .*'neck'"),
        ([dict(until=3, terms=['neck']), dict(terms=[])], "term 'logits' is in no stage"),
        ([dict(until=3, freeze=['backbone', 'neck'], terms=['neck']), {}], r"'neck' teaches nothing in stages\[0\]"),
        ([dict(until=3, train=['head'], terms=['neck']), {}], r"'neck' teaches nothing in stages\[0\]"),
        ([dict(until=10), {}], r'stages\[0\].until=10 is not before the end of the run \(10 iterations\)'),
    ],
    ids=str,
)
def test_refused_before_the_first_iteration(stages, message):
    with pytest.raises(DistillError, match=message) as error:
        session = session_of(stages)
        session.begin_run(Position(0, 10), 10)
        session.check(IMAGES)
    assert len(str(error.value)) < 400


def test_a_term_that_freezes_all_that_it_teaches_is_refused():
    with pytest.raises(DistillError, match="'neck' teaches nothing with what it freezes"):
        session_of(neck={**NECK, 'freeze': ['backbone', 'neck']}).check(IMAGES)
