"""What several teachers of one term come to: against the formulas, in float64."""

import math

import pytest
import torch

from kd_plugins.distiller import Session, build_terms
from kd_plugins.distiller.combining import Compared, build_combination
from kd_plugins.errors import DistillError
from kd_plugins.losses import kl_div
from kd_plugins.predictions import ClassPredictions, DensePredictions, MaskPredictions, PixelPredictions
from kd_plugins.teachers import FrozenTeacher
from tests.unit.distiller.test_iteration import IMAGES, Net, value_of

GENERATOR = torch.Generator().manual_seed(0)
STUDENT, *TEACHERS = (3 * torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64) for _ in range(4))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
BIG_AND_SMALL = ['big:logits', 'small:logits']


def draw(*shape):
    return 3 * torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def session_of(*teachers, **term):
    held = {
        name: FrozenTeacher(net, lambda model, inputs, *rest: model(inputs), lambda inputs, samples: inputs, name='net')
        for name, net in zip(('big', 'small', 'third'), teachers, strict=False)
    }
    term = dict(student='logits', teacher=BIG_AND_SMALL[: len(teachers)]) | term
    return Session(Net(0), held, build_terms(dict(term=dict(loss=dict(type='KLDivLoss', temperature=1.0)) | term)))


# ---------------------------------------------------------------------- means of forms
def test_mean_of_classifiers():
    found = ClassPredictions.average([ClassPredictions(z) for z in TEACHERS])
    torch.testing.assert_close(found.logits.softmax(-1), sum(z.softmax(-1) for z in TEACHERS) / 3)
    found = ClassPredictions.average([ClassPredictions(z, 'sigmoid') for z in TEACHERS])
    torch.testing.assert_close(found.logits.sigmoid(), sum(z.sigmoid() for z in TEACHERS) / 3)
    assert found.activation == 'sigmoid'


def test_a_mean_of_sigmoids_keeps_its_precision_where_all_are_sure():
    logits = torch.tensor([[40.0, -40.0]])
    found = ClassPredictions.average([ClassPredictions(logits, 'sigmoid')] * 3)
    torch.testing.assert_close(found.logits, logits)


def test_mean_of_segmentors_is_at_the_grid_of_the_largest():
    small, large = draw(2, 4, 3, 5), draw(2, 4, 6, 10)
    found = PixelPredictions.average([PixelPredictions(small), PixelPredictions(large)])
    resized = torch.nn.functional.interpolate(small, (6, 10), mode='bilinear', align_corners=False)
    torch.testing.assert_close(found.logits.softmax(1), (resized.softmax(1) + large.softmax(1)) / 2)
    binary = [draw(2, 1, 3, 5) for _ in range(2)]
    found = PixelPredictions.average([PixelPredictions(z) for z in binary])
    torch.testing.assert_close(found.logits.sigmoid(), sum(z.sigmoid() for z in binary) / 2)


def dense(activation='sigmoid', **fields):
    return DensePredictions(
        cls=draw(2, 5, 3), activation=activation, level_sizes=((2, 2), (1, 1)), strides=(8.0, 16.0),
        points=torch.zeros(5, 2), **fields,
    )  # fmt: skip


def test_mean_of_detectors():
    """Probabilities are averaged; boxes and bins by what each teacher is sure of, so both tell the same distances."""
    teachers = [dense(ltrb=draw(2, 5, 4), dist=draw(2, 5, 4, 6), obj=draw(2, 5, 1)) for _ in range(2)]
    found = DensePredictions.average(teachers)
    torch.testing.assert_close(found.cls.sigmoid(), sum(t.cls.sigmoid() for t in teachers) / 2)
    torch.testing.assert_close(found.obj.sigmoid(), sum(t.obj.sigmoid() for t in teachers) / 2)
    sure = [(t.cls.sigmoid().amax(-1) * t.obj.sigmoid()[..., 0])[..., None] + 1e-6 for t in teachers]
    share = [s / sum(sure) for s in sure]
    torch.testing.assert_close(found.ltrb, sum(s * t.ltrb for s, t in zip(share, teachers, strict=True)))
    bins = sum(s[..., None] * t.dist.softmax(-1) for s, t in zip(share, teachers, strict=True))
    torch.testing.assert_close(found.dist.softmax(-1), bins)
    softmax = [dense('softmax') for _ in range(2)]
    found = DensePredictions.average(softmax)
    torch.testing.assert_close(found.cls.softmax(-1), sum(t.cls.softmax(-1) for t in softmax) / 2)


def test_mean_of_detectors_of_two_kinds():
    one, other = dense(obj=draw(2, 5, 1)), dense(ltrb=draw(2, 5, 4))
    found = DensePredictions.average([one, other])
    torch.testing.assert_close(found.cls.sigmoid(), (one.cls.sigmoid() * one.obj.sigmoid() + other.cls.sigmoid()) / 2)
    assert found.obj is None and found.ltrb is None
    with pytest.raises(DistillError, match='not all have it'):
        found.require('ltrb')


@pytest.mark.parametrize('count', [1, 2, 3])
def test_the_mean_of_equal_teachers_is_each_of_them(count):
    for one in (ClassPredictions(TEACHERS[0]), dense(ltrb=draw(2, 5, 4), dist=draw(2, 5, 4, 6))):
        found = type(one).average([one] * count)
        torch.testing.assert_close(found.source.softmax(-1), one.source.softmax(-1))
        if isinstance(one, DensePredictions):
            torch.testing.assert_close(found.ltrb, one.ltrb)
            torch.testing.assert_close(found.dist.softmax(-1), one.dist.softmax(-1))


def test_what_has_no_mean_is_refused():
    with pytest.raises(DistillError, match='at different places or of different classes'):
        ClassPredictions.average([ClassPredictions(TEACHERS[0]), ClassPredictions(TEACHERS[0][:, :3])])
    with pytest.raises(DistillError, match='one term for each teacher'):
        MaskPredictions.average([])


# ---------------------------------------------------------------------- confidence
def weights_of(classes=(None, None, None), target=LABELS, activation='softmax'):
    each = [
        Compared(ClassPredictions(STUDENT[:, :n], activation), ClassPredictions(z[:, :n], activation), known)
        for z, known in zip(TEACHERS, classes, strict=True)
        for n in [4 if known is None else len(known[0])]
    ]
    return torch.stack([c.weights for c in build_combination('confidence', 'combine')(each, target)]).double()


def test_weights_are_those_of_the_paper():
    expected = []
    for i, label in enumerate(LABELS.tolist()):
        errors = [-math.log(math.exp(z[i, label]) / sum(map(math.exp, z[i].tolist()))) for z in TEACHERS]
        total = sum(map(math.exp, errors))
        expected.append([(1 - math.exp(e) / total) / 2 for e in errors])
    found = weights_of()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(0), torch.ones(6, dtype=torch.float64))


def test_a_class_that_a_teacher_does_not_know_is_left_to_the_others():
    two, one = ([0, 1], [0, 1]), ([0, 1, 2], [0, 1, 2])
    found = weights_of((two, one, two))
    threes = LABELS == 3
    known = (len(LABELS) - threes.sum()) / len(LABELS)
    # Nobody knows class 3, which is then no part of the mean; of class 2 the second knows alone.
    assert not found[:, threes].any()
    torch.testing.assert_close(found.sum(0)[~threes] * known, torch.ones(5, dtype=torch.float64))
    assert found[:, LABELS == 2].T.tolist() == [[0.0, pytest.approx(float(1 / known)), 0.0]]


def test_confidence_is_refused_without_labels_or_exclusive_classes():
    for options in (dict(target=None), dict(activation='sigmoid')):
        with pytest.raises(DistillError, match="whose classes exclude each other, or combine='mean'"):
            weights_of(**options)


# ---------------------------------------------------------------------- in a session
def test_a_term_of_several_teachers():
    big, small = Net(1), Net(2)
    session = session_of(big, small)
    (row,) = session.check(IMAGES)
    mean = (big.scores.softmax(-1) + small.scores.softmax(-1)) / 2
    expected = kl_div(session.student.scores, mean.log(), temperature=1.0).item()
    assert row.teacher == 'big:logits + small:logits (mean of their probabilities)'
    value = value_of(session)
    assert value.item() == pytest.approx(expected, rel=1e-5) == row.value
    value.backward()
    assert session.student.scale.grad != 0


@pytest.mark.parametrize(
    'names, text', [(2, 'big:logits + small:logits (mean of their probabilities)'), (1, 'big:logits')]
)
def test_all_teachers_that_there_are(names, text):
    session = session_of(*[Net(1), Net(2)][:names], teacher='*:logits')
    (row,) = session.check(IMAGES)
    assert row.teacher == text and value_of(session) > 0
    assert (session.terms['term'].combine is None) == (names == 1)


def test_equal_teachers_teach_as_one():
    one, two = session_of(Net(1), teacher='logits'), session_of(Net(1), Net(1))
    for session in (one, two):
        session.check(IMAGES)
    assert value_of(two).item() == pytest.approx(value_of(one).item(), rel=1e-6)


def test_by_confidence_a_term_is_the_weighted_sum_of_its_teachers(monkeypatch):
    session = session_of(Net(1), Net(2), combine='confidence')
    target = torch.tensor([3, 1])
    monkeypatch.setattr(session.host, 'targets', lambda inputs, samples: target)
    (row,) = session.check(IMAGES)
    nets = [session.teachers[name].model for name in ('big', 'small')]
    errors = torch.stack([torch.nn.functional.cross_entropy(n.scores, target, reduction='none') for n in nets])
    weights = 1 - errors.softmax(0)
    expected = sum(
        weights[k, i] * kl_div(session.student.scores[i : i + 1], net.scores[i : i + 1], temperature=1.0)
        for k, net in enumerate(nets)
        for i in range(2)
    )
    assert value_of(session).item() == pytest.approx(expected.item() / 2, rel=1e-5) == row.value


def test_both_teachers_run_once_and_only_while_they_teach():
    session = session_of(Net(1), Net(2))
    session.check(IMAGES)
    calls = []
    for name in ('big', 'small'):
        session.teachers[name].model.register_forward_hook(lambda *_, name=name: calls.append(name))
    value_of(session)
    assert calls == ['big', 'small']


@pytest.mark.parametrize(
    'term, message',
    [
        (dict(combine='median'), "combine has no type 'median'"),
        (dict(combine=dict(type='mean', by=2)), 'does not take these options'),
        (dict(teacher=[]), 'must name each teacher once'),
        (dict(teacher=['big:logits', 'big:logits']), 'must name each teacher once'),
        (dict(teacher='big:logits', combine='mean'), 'combine is for several teachers'),
        (dict(teacher=['big:logits', 'smal:logits']), "no teacher 'smal': did you mean 'small'"),
        (dict(teacher=['big:logits', 'logits']), 'there are several teachers; say which one'),
        (dict(loss=dict(type='FeatureMSELoss'), teacher=['big:neck', 'small:neck']), 'one term for each of them'),
        (dict(teacher=['big:logits', 'small:neck[0]']), 'not of one kind'),
        (dict(teacher=['big:neck[0]', 'small:neck[0]'], student='neck[0]'), 'compares tensors here'),
        (dict(combine='confidence'), 'how right each teacher is about the label'),
        (dict(combine='confidence', temperature=dict(type='gap')), 'follows one teacher'),
    ],
    ids=str,
)
def test_refused_before_the_first_iteration(term, message, monkeypatch):
    with pytest.raises(DistillError, match=message) as error:
        session = session_of(Net(1), Net(2), **term)
        if 'temperature' in term:
            monkeypatch.setattr(session.host, 'targets', lambda inputs, samples: torch.tensor([3, 1]))
        session.check(IMAGES)
    assert len(str(error.value)) < 400
