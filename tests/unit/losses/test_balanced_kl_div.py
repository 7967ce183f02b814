"""balanced_kl_div against its formula, computed by hand, and where its counts come from."""

import math

import pytest
import torch

from kd_plugins.distiller import Session, build_terms
from kd_plugins.errors import DistillError
from kd_plugins.losses import BalancedKLDivLoss, balanced_kl_div, kl_div
from kd_plugins.losses.balanced_kl_div import balancing
from kd_plugins.teachers import FrozenTeacher
from tests.unit.distiller.test_iteration import IMAGES, Net, value_of
from tests.unit.losses.test_kl_div import random, softmax

COUNTS = [5000, 700, 90, 10, 0]


def weights(counts, beta):
    return [(1 - beta) / (1 - beta ** max(n, 1)) for n in counts]


@pytest.mark.parametrize('beta', [0.0, 0.9, 0.9999])
@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_formula(temperature, beta):
    student, teacher = random(4, 5), random(4, 5, seed=1)
    rows = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        balanced = [w * p for w, p in zip(weights(COUNTS, beta), softmax(t, temperature), strict=True)]
        balanced = [p / sum(balanced) for p in balanced]
        rows.append(sum(b * math.log(b / a) for a, b in zip(softmax(s, temperature), balanced, strict=True)))
    expected = temperature**2 * sum(rows) / len(rows)
    found = balanced_kl_div(student, teacher, COUNTS, temperature=temperature, beta=beta)
    assert found.item() == pytest.approx(expected, rel=1e-10)
    loss = BalancedKLDivLoss(temperature, beta, COUNTS)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-10)


def test_weights_of_few_and_of_many_images():
    """One image weighs 1; of very many, 1 - beta; both to the last digits, where beta to their power nears 1 or 0."""
    found = balancing([1, 2, 10**9], 0.9999).exp()
    assert found.dtype == torch.float64
    ratio = (found * 1e-4).tolist()
    assert ratio == pytest.approx([1.0, 1 / 1.9999, 1e-4], rel=1e-9)


@pytest.mark.parametrize('options', [dict(counts=[20] * 5), dict(counts=COUNTS, beta=0.0)], ids=str)
def test_where_nothing_is_to_be_balanced_it_is_kl_div(options):
    student, teacher = random(4, 5), random(4, 5, seed=1)
    expected = kl_div(student, teacher, temperature=2.0)
    torch.testing.assert_close(balanced_kl_div(student, teacher, **options), expected)


def test_it_is_least_at_the_balanced_teacher():
    teacher = random(4, 5, seed=1)
    student = teacher + 2.0 * balancing(COUNTS, 0.99)
    assert balanced_kl_div(student, teacher, COUNTS, beta=0.99).item() == pytest.approx(0, abs=1e-12)
    assert balanced_kl_div(teacher, teacher, COUNTS, beta=0.99) > 0.01


def test_one_count_per_class():
    with pytest.raises(DistillError, match='5 classes and 3 counts; give one for each'):
        balanced_kl_div(random(4, 5), random(4, 5), COUNTS[:3])
    with pytest.raises(DistillError, match=r'give counts=\[...\]'):
        BalancedKLDivLoss()(random(4, 5), random(4, 5))


# ---------------------------------------------------------------------- in a session
def session_of(known=None, classes=None, **loss):
    teacher = FrozenTeacher(Net(1), lambda model, inputs, *_: model(inputs), lambda inputs, samples: inputs, name='net')
    term = dict(loss=dict(type='BalancedKLDivLoss', **loss), student='logits', teacher='logits')
    session = Session(Net(0), teacher, build_terms(dict(term=term)), classes=classes)
    session.host.counts = known
    return session


def test_a_session_asks_the_host_once():
    asked = []
    session = session_of(lambda: asked.append(1) or COUNTS)
    session.check(IMAGES)
    ours, theirs = session.student.scores, session.teacher.model.scores
    assert value_of(session).item() == pytest.approx(balanced_kl_div(ours, theirs, COUNTS).item(), rel=1e-6)
    assert value_of(session).item() > 0 and len(asked) == 1


def test_counts_that_are_given_are_taken():
    session = session_of(lambda: 1 / 0, counts=[1, 2, 3, 4, 5])
    session.check(IMAGES)
    expected = balanced_kl_div(session.student.scores, session.teacher.model.scores, [1, 2, 3, 4, 5])
    assert value_of(session).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize('given', [{}, dict(counts=COUNTS)])
def test_counts_are_those_of_the_classes_that_are_compared(given, monkeypatch):
    index = [4, 1, 0], [0, 2, 3]
    session = session_of(lambda: COUNTS, classes=index, **given)
    monkeypatch.setattr(session.host, 'targets', lambda inputs, samples: torch.tensor([0, 4]))
    session.check(IMAGES)
    ours, theirs = (net.scores[:, i] for net, i in zip((session.student, session.teacher.model), index, strict=True))
    expected = balanced_kl_div(ours, theirs, [0, 700, 5000])
    assert value_of(session).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize('known', [None, lambda: None], ids=['no host knows', 'this data set does not tell'])
def test_refused_where_nobody_knows(known):
    with pytest.raises(DistillError, match=r'write them in the order of the classes: .*counts=\[500, 20') as error:
        session_of(known).check(IMAGES)
    assert len(str(error.value)) < 400
