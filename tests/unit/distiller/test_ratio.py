"""``weight='auto:0.5'``: the weight that holds a term at a share of the student's own loss."""

from types import SimpleNamespace

import pytest
import torch

from kd_plugins.distiller import Position, build_terms, ranks, ratio
from kd_plugins.distiller.ratio import Ratio, build_weight
from kd_plugins.distiller.schedules import Constant
from kd_plugins.errors import DistillError
from tests.unit.distiller.test_iteration import IMAGES, Net, session_of

TERM = dict(loss=dict(type='KLDivLoss'), student='logits', teacher='logits')


def numbers(*values):
    return [torch.tensor(v) for v in values]


def fed(found, pairs):
    return [float(found.weight(*numbers(*pair))) for pair in pairs]


def test_spellings():
    for value in ('auto:0.5', 'auto: 0.5', dict(type='auto', target=0.5)):
        schedule, found = build_weight(value, 'weight')
        assert schedule == Constant(1.0) and (found.target, found.batches, found.track) == (0.5, 50, False)
    assert str(found) == 'auto: 0.5 of the task loss, of 50 batches'
    schedule, found = build_weight(
        dict(type='auto', target=2, track=True, schedule=dict(type='linear', start=1, end=0)), 'weight'
    )
    assert schedule(Position(5, 10)) == 0.5 and str(found) == 'auto: 2 of the task loss, tracked'
    assert build_weight(3, 'weight') == (Constant(3.0), None)
    (term,) = build_terms(dict(a=dict(TERM, weight=dict(type='auto', target=1)))).values()
    assert term.weight_text == 'auto: 1 of the task loss, of 50 batches' and not term.always_zero


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ('auto', r"weight must say at what share .*'auto:0\.5', got 'auto'"),
        ('auto:much', "got 'auto:much'"),
        ('auto:0', r'weight\.target must be a finite number > 0'),
        ('automatic', 'a number or a schedule'),
        (dict(type='auto'), "needs 'target'"),
        (dict(type='auto', target=0.5, batch=3), "no option 'batch': did you mean 'batches'"),
        (dict(type='auto', target=0.5, batches=0), 'batches must be a whole number'),
        (dict(type='auto', target=0.5, track='yes'), 'track must be True or False'),
        (dict(type='auto', target=0.5, schedule=2), 'a number belongs into target'),
    ],
)
def test_refusals(value, message):
    with pytest.raises(DistillError, match=message):
        build_weight(value, 'weight')


def test_it_is_that_of_the_means_so_far_and_then_fixed():
    found = Ratio(0.5, batches=2)
    assert fed(found, [(4.0, 1.0), (2.0, 2.0), (100.0, 1.0)]) == pytest.approx([0.5 * 4, 0.5 * 6 / 3, 0.5 * 6 / 3])
    assert found.current == pytest.approx(1.0)


def test_it_follows_where_it_is_told_to():
    found = Ratio(1.0, batches=2, track=True)
    # The first ones count alike, then each mean keeps half: tasks 4, 2, 8 -> (4 + 2) / 2 + 8.
    assert fed(found, [(4.0, 1.0), (2.0, 1.0), (8.0, 1.0)]) == pytest.approx([4, 3, 11 / 2])


def test_batches_that_are_not_finite_do_not_count():
    found = Ratio(0.5, batches=3)
    assert fed(found, [(4.0, 1.0), (float('inf'), 1.0), (2.0, float('nan'))]) == pytest.approx([2, 2, 2])


def test_equal_models_do_not_get_an_endless_weight():
    assert fed(Ratio(0.5, most=10), [(4.0, 0.0)]) == [10]
    assert fed(Ratio(0.5), [(4.0, 1e-12)]) == [ratio.MOST]


def test_no_gradient_flows_through_it():
    value = torch.tensor(2.0, requires_grad=True)
    weight = Ratio(0.5).weight(value * 3, value)
    assert not weight.requires_grad and float(weight) == 1.5


def test_ranks_agree(monkeypatch):
    """The sums are those of all."""

    def all_reduce(tensor):
        tensor += torch.tensor([2.0, 3.0])

    there = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=all_reduce
    )
    monkeypatch.setattr(ranks, 'distributed', there)
    assert fed(Ratio(1.0), [(4.0, 1.0)]) == pytest.approx([6 / 4])


def test_a_resumed_one_goes_on():
    pairs = [(4.0, 1.0), (2.0, 2.0), (3.0, 1.0), (9.0, 2.0)]
    for options in (dict(batches=3), dict(batches=2, track=True)):
        whole, first, second = (Ratio(0.5, **options) for _ in range(3))
        expected = fed(whole, pairs)
        fed(first, pairs[:2])
        second.load_state(first.state())
        assert fed(second, pairs[2:]) == expected[2:]


# ------------------------------------------------------------------ in a session
def losses(session, task):
    with session.capture() as capture:
        session.student(IMAGES)
    return session.losses(capture, IMAGES, None, task)['loss_kd_term']


@pytest.mark.parametrize('alpha', [None, 0.25])
def test_kd_is_held_at_its_share(alpha):
    session = session_of(Net(0), Net(1), **TERM, weight='auto:0.5')
    session.alpha = alpha
    session.check(IMAGES)
    session.begin_run(Position(0, 10), 10)
    assert session.weights == dict(term=0.0), 'before the first iteration nobody knows'
    task = torch.tensor(7.0)
    value = losses(session, task)
    # With alpha what counts of the student's own loss is less.
    assert value.item() == pytest.approx(0.5 * 7 * (1 if alpha is None else 1 - alpha))
    value.backward()
    assert session.student.scale.grad != 0 and session.weights['term'] > 0
    # The same, whatever the loss would have been.
    other = session_of(Net(0), Net(1), **{**TERM, 'loss': dict(type='KLDivLoss', temperature=1.0)}, weight='auto:0.5')
    other.alpha = alpha
    other.check(IMAGES)
    assert losses(other, task).item() == pytest.approx(value.item())


def test_its_state_is_that_of_the_session():
    first, second = (session_of(Net(0), Net(1), **TERM, weight='auto:0.5') for _ in range(2))
    losses(first, torch.tensor(7.0))
    second.load_state(first.state(), 'a file')
    assert second.weights == first.weights and second.weights['term'] > 0
    # A run that had none is one whose weight is found now.
    second.load_state({}, 'a file')
    assert session_of(Net(0), Net(1), **TERM).state() == {}


def test_what_it_is_a_share_of_is_missing():
    session = session_of(Net(0), Net(1), **TERM, weight='auto:0.5')
    with pytest.raises(DistillError, match=r"term 'term': weight='auto' .*session\.losses\(\.\.\., task=loss\)"):
        losses(session, None)
    session.alpha = 1.0
    with pytest.raises(DistillError, match=r"the student's own loss, which alpha=1 leaves out"):
        session.begin_run(Position(0, 10), 10)


# ------------------------------------------------------------------ before the run
@pytest.mark.parametrize(
    ('run', 'term', 'position', 'message'),
    [
        (dict(start=5), {}, Position(0, 10, 0, 0, 5), r'^start=5 is not before the end of the run \(5 epochs\)'),
        (dict(start=10), {}, Position(0, 10), r'^start=10 is not before the end of the run \(10 iterations\)'),
        ({}, dict(start=5), Position(0, 10, 0, 0, 5), r"^term 'term': start=5 is not before the end of the run"),
        (dict(stop=3), dict(start=3), Position(0, 10, 0, 0, 5), r"^term 'term': start=3 is not before stop, .*\(3 ep"),
        (
            {},
            dict(weight=dict(type='exponential', start=1, gamma=0.99)),
            Position(0, 10),
            r"^term 'term': this run counts iterations, not epochs; write by='iterations'",
        ),
        (
            {},
            dict(temperature=dict(type='exponential', start=4, gamma=0.99, end=1)),
            Position(0, 10),
            "^term 'term': this run counts iterations",
        ),
    ],
)
def test_what_could_never_run_is_refused(run, term, position, message):
    from kd_plugins.distiller import build_window

    session = session_of(Net(0), Net(1), **{**TERM, **term})
    session.window = build_window(run.get('start'), run.get('stop'))
    with pytest.raises(DistillError, match=message):
        session.begin_run(position, int(position.epochs or position.max_iterations))
    # Where nobody knows the end yet.
    if 'start' in run:
        session.begin_run(position)
