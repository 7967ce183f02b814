"""Temperatures that follow the gap to the teacher, or are learned."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_plugins.distiller import Position, ranks, temperature
from kd_plugins.distiller.optimizer import AdapterOptimizer
from kd_plugins.distiller.ratio import build_weight
from kd_plugins.distiller.schedules import build_schedule
from kd_plugins.distiller.temperature import GapTemperature, LearnedTemperature, build_temperature
from kd_plugins.errors import DistillError
from kd_plugins.losses import kl_div
from kd_plugins.predictions import ClassPredictions
from tests.unit.distiller.test_iteration import IMAGES, Net, session_of

LOGITS = dict(loss=dict(type='KLDivLoss'), student='logits', teacher='logits')
LABELS = torch.tensor([1, 4])


def read(**options):
    return build_temperature(options, 'temperature')


def predictions(sure):
    """Of two images of classes 0 and 1: with this logit for the right one of three."""
    return ClassPredictions(sure * torch.eye(3)[:2])


def epoch(number, batch=0):
    return Position(4 * number + batch, 40, number, number + batch / 4, 10)


# ------------------------------------------------------------------ the gap
def test_it_rises_while_the_teacher_is_better_and_falls_when_it_is_caught_up():
    found = read(type='gap', start=1.0, high=1.2)
    target, values = torch.tensor([0, 1]), []
    for number, (student, teacher) in enumerate([(0, 5), (0, 5), (0, 5), (5, 0), (1, 1), (5, 0), (5, 0)]):
        for batch in range(4):
            found.begin(epoch(number, batch))
            found.observe(predictions(student), predictions(teacher), target, None)
        values.append(found(epoch(number)))
    found.begin(epoch(7))
    # Of the epoch before: twice up, at the limit, down, unchanged, down, at the other limit.
    assert [*values, found.value] == [1.0, 1.1, 1.2, 1.2, 1.1, 1.1, 1.0, 1.0]
    assert str(found) == '1, by the gap to the teacher (1 to 1.2)'


def test_its_gap_is_that_of_the_losses():
    """Just within and just beyond the tolerance; images that do not count are left out."""
    target, known = torch.tensor([0, 1]), torch.tensor([True, False])
    losses = [-math.log(math.exp(z) / (math.exp(z) + 2)) for z in (1.0, 2.0)]
    for tolerance, expected in ((losses[0] - losses[1] + 1e-4, 2.0), (losses[0] - losses[1] - 1e-4, 2.5)):
        found = read(type='gap', start=2.0, step=0.5, tolerance=tolerance)
        found.begin(epoch(0))
        student = ClassPredictions(torch.tensor([[1.0, 0, 0], [9.0, 0, 0]]))
        found.observe(student, predictions(2.0), target, known)
        found.begin(epoch(1))
        assert found.value == expected


def test_without_epochs_it_changes_now_and_then(monkeypatch):
    monkeypatch.setattr(temperature, 'EVERY', 3)
    found, values = GapTemperature(), []
    for step in range(7):
        found.begin(Position(step, 7, step))
        found.observe(predictions(0), predictions(5), torch.tensor([0, 1]), None)
        values.append(found.value)
    assert values == [1.0, 1.0, 1.0, 1.1, 1.1, 1.1, 1.2]


def test_ranks_agree(monkeypatch):
    def all_reduce(sums):
        sums += torch.tensor([-100.0, 2.0])

    there = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=all_reduce
    )
    monkeypatch.setattr(ranks, 'distributed', there)
    found = GapTemperature(start=2.0)
    found.begin(epoch(0))
    found.observe(predictions(0), predictions(5), torch.tensor([0, 1]), None)
    assert found.state()['sums'][1] == 4, 'what is saved by one rank is resumed on all'
    found.begin(epoch(1))
    assert found.value == 1.9, 'the other rank was ahead of its teacher by far'


def test_a_resumed_one_goes_on():
    target = torch.tensor([0, 1])
    whole, first, second = (GapTemperature() for _ in range(3))
    for found in (whole, first):
        for number in range(2):
            found.begin(epoch(number))
            found.observe(predictions(0), predictions(5), target, None)
    second.load_state(first.state())
    for found in (whole, second):
        found.begin(epoch(2))
    assert second.value == whole.value == 1.2


def test_a_session_asks_it():
    session = session_of(Net(0), Net(1), **LOGITS, temperature=dict(type='gap', start=3.0))
    session.host.targets = lambda inputs, samples: LABELS
    session.check(IMAGES)
    gap = session.terms['term'].temperature
    assert gap.state()['sums'] is None, 'the check is no iteration'
    session.begin_run(epoch(0), 10)
    session.begin_iteration(epoch(0))
    with session.capture() as capture:
        session.student(IMAGES)
    value = session.losses(capture, IMAGES, None)['loss_kd_term']
    assert value.item() == pytest.approx(
        kl_div(session.student.scores, session.teacher.model.scores, temperature=3.0).item()
    )
    ours, theirs = (nn.functional.cross_entropy(m.scores, LABELS) for m in (session.student, session.teacher.model))
    session.begin_iteration(epoch(1))
    expected = 3.0 + (0.1 if ours - theirs > 0.1 else -0.1)
    assert abs(ours - theirs) > 0.1 and session.temperatures == dict(term=pytest.approx(expected))
    session.close_row('epoch', 1)
    assert session.history.rows[0]['temperature_term'] == pytest.approx(expected)
    other = session_of(Net(0), Net(1), **LOGITS, temperature=dict(type='gap', start=3.0))
    other.load_state(session.state(), 'a file')
    assert other.temperatures == session.temperatures


# ------------------------------------------------------------------ learned
def test_it_begins_where_the_paper_does():
    found = read(type='learned')
    assert found(Position(0, 100)).item() == pytest.approx(1 + 20 / (1 + math.exp(-1)), rel=1e-6)
    assert str(found) == 'learned, 15.6 at first (1 to 21)'


def test_its_gradient_is_reversed_and_grows():
    found = read(type='learned', strength=dict(type='linear', start=0, end=1))
    gradients = []
    for fraction in (0, 0.5, 1):
        found.theta.grad = None
        (found(Position(fraction, 1)) ** 2).backward()
        gradients.append(found.theta.grad.item())
    s = 1 / (1 + math.exp(-1))
    plain = 2 * (1 + 20 * s) * 20 * s * (1 - s)
    assert gradients == pytest.approx([0, -0.5 * plain, -plain], rel=1e-5)


def trained(decay):
    torch.manual_seed(0)
    session = session_of(Net(0), Net(1), **LOGITS, temperature=dict(type='learned', strength=1.0))
    session.check(IMAGES)
    optimizer = torch.optim.SGD(session.student.parameters(), lr=0.5, weight_decay=decay)
    session.attach(optimizer)
    session.begin_iteration(Position(0, 10))
    with session.capture() as capture:
        session.student(IMAGES)
    value = session.losses(capture, IMAGES, None)['loss_kd_term']
    value.backward()
    theta = session.terms['term'].temperature.theta
    expected = theta.detach() - 0.5 * theta.grad
    optimizer.step()
    assert theta.item() == pytest.approx(expected.item(), rel=1e-6) and theta.item() != 1.0
    return session, value


def test_it_is_trained_with_the_adapters_and_does_not_decay():
    session, value = trained(0.0)
    start = 1 + 20 / (1 + math.exp(-1))
    expected = kl_div(Net(0).scores, Net(1).scores, temperature=start).item()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    decayed, _ = trained(0.3)
    assert decayed.terms['term'].temperature.theta.item() == session.terms['term'].temperature.theta.item()
    assert session.trainable and list(session.state()['adapters']) == ['term.temperature.theta']


def test_decay_is_for_the_adapters_beside_it():
    """Their numbers in a saved state are those of the groups."""
    from kd_plugins.distiller import AdapterBank

    def made():
        bank, student = AdapterBank(), nn.Linear(2, 2)
        bank.add_module('a', LearnedTemperature(build_schedule(1.0, 'x')))
        bank.add_module('b', nn.Linear(2, 1, bias=False))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1, weight_decay=0.5, momentum=0.9)
        return bank, student, optimizer, AdapterOptimizer(bank, optimizer)

    bank, student, optimizer, own = made()
    before = bank.b.weight.detach().clone()
    for module in (student, bank.b):
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
    bank.a.theta.grad = torch.tensor(2.0)
    optimizer.step()
    assert torch.allclose(bank.b.weight, before * (1 - 0.1 * 0.5)) and bank.a.theta.item() == pytest.approx(1 - 0.2)
    other = made()
    other[3].load_state(own.state(), 'a file')
    saved = other[3].own.state
    assert saved[other[0].a.theta]['momentum_buffer'].item() == 2.0
    assert saved[other[0].b.weight]['momentum_buffer'].shape == (1, 2)


class ByHand(nn.Module):
    """A user's loss with a gradient of its own, which leaves the temperature out."""

    consumes = 'logits'
    temperature = 1.0

    def forward(self, student, teacher):
        return ((student - teacher) / float(self.temperature)).square().mean()


@pytest.mark.parametrize(
    ('term', 'message'),
    [
        (
            dict(LOGITS, temperature=dict(type='gap'), student='neck', teacher='neck'),
            'depends on what is predicted, and the term compares tensors',
        ),
        (dict(LOGITS, temperature=dict(type='learned'), loss=dict(type=ByHand)), 'takes its temperature as a constant'),
    ],
)
def test_refused_before_the_run(term, message):
    session = session_of(Net(0), Net(1), **term)
    with pytest.raises(DistillError, match=message):
        session.check(IMAGES)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(type='gap', start=9), 'low <= start <= high is needed, got 1, 9 and 5'),
        (dict(type='gap', low=0), r'temperature\.low must be a finite number > 0'),
        (dict(type='gap', steps=1), "no option 'steps': did you mean 'step'"),
        (dict(type='learned', span=0), r'temperature\.span must be a finite number > 0'),
        (dict(type='learned', strength=-1), r'temperature\.strength must be a finite number >= 0'),
    ],
)
def test_refusals(options, message):
    with pytest.raises(DistillError, match=message):
        read(**options)


@pytest.mark.parametrize('kind', ['gap', 'learned'])
def test_they_are_no_weights(kind):
    with pytest.raises(DistillError, match=f"type='{kind}' is for temperatures"):
        build_weight(dict(type=kind), 'weight')


@pytest.mark.parametrize('kind', ['gap', 'learned'])
def test_inside_another_schedule_nobody_would_ask_or_train_them(kind):
    inner = dict(type=kind)
    for value in (
        dict(type='auto', target=0.5, schedule=inner),
        dict(type='auto', target=0.5, schedule=dict(type='warmup', value=inner, until=0.1)),
        dict(type='warmup', value=inner, until=0.1),
    ):
        with pytest.raises(DistillError, match=f"has no schedule type '{kind}'"):
            build_weight(value, 'weight')
    with pytest.raises(DistillError, match=f"strength has no schedule type '{kind}'"):
        read(type='learned', strength=inner)
    with pytest.raises(DistillError, match="did you mean 'learned'"):
        read(type='learnd')


def test_a_detector_has_no_gap():
    with pytest.raises(DistillError, match='take it for classifiers'):
        GapTemperature().check(SimpleNamespace(source=torch.zeros(2, 5, 3), activation='sigmoid'))
