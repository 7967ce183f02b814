"""What the engine makes of one iteration: levels, precision, the temperature of the moment, heads that ran twice."""

import weakref

import pytest
import torch
from torch import nn

from kd_plugins.distiller import Position, Session, build_terms, build_window
from kd_plugins.errors import DistillError
from kd_plugins.losses import feature_mse, kl_div
from kd_plugins.predictions import ClassLogits, ClassPredictions
from kd_plugins.teachers import FrozenTeacher

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Net(nn.Module):
    """A neck of three levels and class logits, in any dtype; everything is a multiple of what trains."""

    def __init__(self, seed, dtype=torch.float32, runs=1):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scale = nn.Parameter(torch.ones(()))
        self.neck, self.logits = nn.Identity(), ClassLogits(5)
        self.levels = [torch.randn(2, 4, side, side, generator=generator).to(dtype) for side in (8, 4, 2)]
        self.scores, self.runs = torch.randn(2, 5, generator=generator).to(dtype), runs

    def forward(self, images):
        self.neck([self.scale.to(level.dtype) * level for level in self.levels])
        for run in range(self.runs):
            found = self.logits(self.scale.to(self.scores.dtype) * self.scores * (1 + run))
        return found


def run(model, inputs, samples, modules):
    model(inputs)


def session_of(student, teacher, /, **term):
    held = FrozenTeacher(
        teacher, lambda model, inputs, *rest: model(inputs), lambda inputs, samples: inputs, name='net'
    )
    return Session(student, held, build_terms(dict(term=term)))


def value_of(session):
    with session.capture() as capture:
        session.student(IMAGES)
    return session.losses(capture, IMAGES, None)['loss_kd_term']


def test_a_term_is_the_mean_over_its_levels():
    """Whatever their size: not their sum, and not the mean over all positions."""
    student, teacher = Net(0), Net(1)
    term = dict(loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck')
    session = session_of(student, teacher, **term)
    (row,) = session.check(IMAGES)
    each = [feature_mse(ours, theirs).item() for ours, theirs in zip(student.levels, teacher.levels, strict=True)]
    assert len({round(v, 2) for v in each}) == 3
    assert value_of(session).item() == pytest.approx(sum(each) / 3, rel=1e-6)
    assert row.value == pytest.approx(sum(each) / 3, rel=1e-6)
    session = session_of(student, teacher, **{**term, 'student': 'neck[1]', 'teacher': 'neck[1]'})
    session.check(IMAGES)
    assert value_of(session).item() == pytest.approx(each[1], rel=1e-6)


class Probe(nn.Module):
    """A user's own loss, which does nothing for its precision."""

    def __init__(self, consumes):
        super().__init__()
        self.consumes, self.seen = consumes, set()

    def forward(self, student, teacher):
        ours, theirs = (t.flatten(1) for t in (student, teacher))
        product = ours @ theirs.T
        self.seen |= {student.dtype, teacher.dtype, product.dtype}
        return product.mean()


@pytest.mark.parametrize('consumes, tap', [('features', 'neck'), ('logits', 'logits')])
@pytest.mark.parametrize(
    'student, teacher, seen',
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_losses_are_computed_in_float32_whatever_the_models_run_in(consumes, tap, student, teacher, seen):
    """Half precision overflows. Also under the autocast of a trainer; what is more precise stays."""
    loss = dict(type=Probe, consumes=consumes)
    session = session_of(Net(0, student), Net(1, teacher), loss=loss, student=tap, teacher=tap)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        session.check(IMAGES)
        probe = session.terms['term'].loss
        assert probe.seen == {seen}
        probe.seen.clear()
        value = value_of(session)
    assert probe.seen == {seen} and value.dtype == seen
    value.backward()
    assert session.student.scale.grad.isfinite() and session.student.scale.grad != 0


def test_a_loss_has_the_temperature_of_the_moment():
    student, teacher = Net(0), Net(1)
    cooling = dict(type='linear', start=4.0, end=1.0, begin=0.0, until=0.8)
    session = session_of(
        student, teacher, loss=dict(type='KLDivLoss'), student='logits', teacher='logits', temperature=cooling
    )
    session.check(IMAGES)
    for done, expected in ((0, 4.0), (4, 2.5), (8, 1.0), (10, 1.0), (2, 3.25)):
        session.begin_iteration(Position(done, 10))
        value = value_of(session)
        assert session.terms['term'].loss.temperature == pytest.approx(expected)
        assert value.item() == pytest.approx(kl_div(student.scores, teacher.scores, temperature=expected).item())


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_a_head_that_ran_twice_is_refused(side, monkeypatch):
    """Which of the two is meant nobody knows: of a siamese network's branches, for one."""
    runs = {'student': 1, 'teacher': 1, side: 2}
    models = Net(0, runs=runs['student']), Net(1, runs=runs['teacher'])
    term = dict(loss=dict(type='KLDivLoss'), student='logits', teacher='logits')
    words = f"^term 'term': {side} module 'logits' ran 2 times in one forward pass; tap the module around it"
    with pytest.raises(DistillError, match=words):
        session_of(*models, **term).check(IMAGES)
    # Unless heads of its form run again to feed themselves: then the first call counts.
    monkeypatch.setattr(ClassPredictions, 'repeated', True)
    (row,) = session_of(*models, **term).check(IMAGES)
    assert row.value == pytest.approx(kl_div(models[0].scores, models[1].scores).item())


def test_a_head_that_runs_twice_in_training_only_is_refused_in_the_first_iteration():
    session = session_of(Net(0), Net(1), loss=dict(type='KLDivLoss'), student='logits', teacher='logits')
    session.check(IMAGES)
    session.student.runs = 2
    with pytest.raises(DistillError, match=r"term 'term': student module 'logits' ran 2 times"):
        value_of(session)


def test_tokens_of_no_image_have_no_grid():
    """A batch that is no tensor says nothing of how large the images were."""
    student, teacher = Net(0), Net(1)
    student.levels, teacher.levels = [torch.zeros(2, 17, 4)], [torch.ones(2, 65, 4)]
    session = session_of(student, teacher, loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck')
    with session.capture() as capture:
        student(IMAGES)
    with pytest.raises(DistillError, match=r"student 'neck': the batch is no tensor of images, .*an adapter of your"):
        session.losses(capture, {'images': IMAGES}, None)


def distilled(session, position):
    """One iteration: what the log is told, and whether the teacher ran."""
    said = session.begin_iteration(position)
    ran = []
    session.teachers and session.teacher.model.register_forward_hook(lambda *args: ran.append(1))
    if session.active:
        value_of(session)
    return said, bool(ran)


COSINE = dict(type='cosine', start=1, end=0, until=0.5)
ENDINGS = {
    'of the run': (build_window(None, 2), {}),
    'of the term': (None, dict(stop=2)),
    'of its weight': (None, dict(weight=dict(type='linear', start=1, end=0, until=0.5))),
    'of its points': (None, dict(weight=dict(type='piecewise', points=[[0, 1], [0.4, 1], [0.4, 0], [1, 0]]))),
    'warmed up': (
        {},
        dict(weight=dict(type='warmup', until=0.1, value=dict(type='cosine', start=1, end=0, until=0.5))),
    ),
}


@pytest.mark.parametrize('ending', ENDINGS)
def test_after_its_end_there_is_no_teacher(ending):
    """It is not run, and nothing holds its memory; iterations are those of the plain run."""
    window, term = ENDINGS[ending]
    session = session_of(Net(0), Net(1), loss=dict(type='KLDivLoss'), student='logits', teacher='logits', **term)
    session.window = window or session.window
    session.begin_run(Position(0, 8, 0, 0, 4), 4)
    session.check(IMAGES)
    held = weakref.ref(session.teacher.model)
    for batch in range(8):
        said, ran = distilled(session, Position(batch, 8, batch // 2, batch / 2, 4))
        assert ran == (('warmed' in ending) <= batch < 4) and (said is not None) == (batch == 4)
    assert held() is None and session.teachers == {} and session.finish() is None
    assert session.state() == {} and session.weights == dict(term=0.0)
    with session.capture() as capture:
        session.student(IMAGES)
    assert session.losses(capture, IMAGES, None)['loss_kd_term'] == 0


def test_what_may_come_on_again_keeps_its_teacher():
    """A start that is still to come, a weight that rises again, a plain run of weight 0 that is compared with."""
    for term in (
        dict(start=3),
        dict(weight=dict(type='piecewise', points=[[0, 1], [0.3, 0], [0.9, 0], [1, 1]])),
        dict(weight=0.0),
    ):
        session = session_of(Net(0), Net(1), loss=dict(type='KLDivLoss'), student='logits', teacher='logits', **term)
        session.begin_run(Position(0, 8, 0, 0, 4), 4)
        for batch in range(8):
            session.begin_iteration(Position(batch, 8, batch // 2, batch / 2, 4))
            session.active and value_of(session)
        assert list(session.teachers) == ['']


def test_one_of_two_teachers_may_go():
    def held():
        return FrozenTeacher(
            Net(1), lambda model, inputs, *rest: model(inputs), lambda inputs, samples: inputs, name='n'
        )

    term = dict(loss=dict(type='KLDivLoss'), student='logits')
    terms = dict(first=dict(term, teacher='a:logits', stop=1), second=dict(term, teacher='b:logits'))
    session = Session(Net(0), dict(a=held(), b=held()), build_terms(terms))
    session.check(IMAGES)
    said = [session.begin_iteration(Position(i, 2, i)) for i in range(2)]
    assert (
        said[0] is None and said[1].endswith('released; 1 of the teachers go on.') and list(session.teachers) == ['b']
    )
