"""Each of a user's files beside this one adds one thing, by the options of a run, to a session like any other."""

import math

import pytest
import torch
from torch import nn

from kd_plugins.distiller import Host, Position, build_terms, resolver_of
from kd_plugins.errors import DistillError
from kd_plugins.losses import kl_div
from kd_plugins.predictions import ClassLogits, Form, form, readable
from kd_plugins.predictions.pixels import PixelPredictions
from kd_plugins.teachers import ULTRALYTICS, FrozenTeacher
from kd_plugins.teachers.run import RunOptions, load_teachers, open_session

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class DepthHead(nn.Module):
    """Found by its name."""

    def __init__(self, stride):
        super().__init__()
        self.conv = nn.Conv2d(4, 1, stride, stride)

    def forward(self, feature):
        return self.conv(feature).exp()


class Net(nn.Module):
    """Features, classes and depth."""

    def __init__(self, seed, stride=1):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.linear = nn.Linear(4, 5)
        self.logits = ClassLogits(5)
        self.depth = DepthHead(stride)

    def forward(self, images):
        feature = self.body(images)
        return self.logits(self.linear(feature.mean((2, 3)))), self.depth(feature)


FEATURES = dict(loss=dict(type='LogCoshLoss', scale=2.0), student='body', teacher='body')
LOGITS = dict(loss=dict(type='KLDivLoss', temperature=2.0), student='logits', teacher='logits')
DEPTH = dict(loss=dict(type='ScaleInvariantLoss', share=0.25), student='depth', teacher='depth')


def held(teacher):
    return FrozenTeacher(teacher, lambda net, images, *_: net(images), lambda images, _: images, name='net')


def session_of(imports, term, teacher_stride=1):
    """As a host opens one."""
    student, teacher = Net(0), Net(1, teacher_stride)
    options = RunOptions.read(dict(teacher=dict(), terms=dict(mine=term), imports=imports))
    session = open_session(student, {'': held(teacher)}, options, Host())
    return session, student, teacher


def value_of(session, student, progress=0.0):
    """The KD loss of one iteration, and its gradient in the student's first layer."""
    session.begin_iteration(Position(progress, 1))
    with session.capture() as capture:
        student(IMAGES)
    value = session.losses(capture, IMAGES, None)['loss_kd_mine']
    student.zero_grad()
    value.backward()
    return value.item(), student.body.weight.grad


def test_a_loss(own_files):
    session, student, teacher = session_of([own_files['loss']], FEATURES)
    (row,) = session.check(IMAGES)
    value, gradient = value_of(session, student)
    gap = (student.body(IMAGES) - teacher.body(IMAGES)).double()
    # log cosh x = |x| + log(1 + exp(-2|x|)) - log 2
    size = 2 * gap.abs()
    assert value == pytest.approx((size + (-2 * size).exp().log1p() - math.log(2)).mean().item(), rel=1e-5)
    assert row.loss == 'LogCoshLoss' and gradient.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_a_loss_is_also_found_by_the_path_of_its_module(own_files):
    loss = dict(type=f'{own_files["loss"]}.LogCoshLoss', scale=2.0)
    session_of([own_files['loss']], {**FEATURES, 'loss': loss})[0].check(IMAGES)


@pytest.mark.parametrize('progress, factor', [(0.0, 2.0), (0.25, 1.0), (1.0, 0.125)])
def test_a_schedule(own_files, progress, factor):
    weight = dict(type='halving', start=2.0, times=4)
    session, student, teacher = session_of([own_files['schedule']], {**LOGITS, 'weight': weight})
    (row,) = session.check(IMAGES)
    value, gradient = value_of(session, student, progress)
    expected = kl_div(student(IMAGES)[0], teacher(IMAGES)[0], temperature=2.0).item()
    assert value == pytest.approx(factor * expected, rel=1e-5) and expected > 0
    assert row.weight == '2, halved 4 times' and gradient.abs().sum() > 0


def test_a_schedule_of_a_temperature(own_files):
    temperature = dict(type='halving', start=8, times=1)
    session, student, teacher = session_of([own_files['schedule']], {**LOGITS, 'temperature': temperature})
    session.check(IMAGES)
    expected = kl_div(student(IMAGES)[0], teacher(IMAGES)[0], temperature=4.0).item()
    assert value_of(session, student, 1.0)[0] == pytest.approx(expected, rel=1e-5)


def test_a_sample_weighting(own_files):
    samples = dict(type='certainty', least=0.001)
    session, student, teacher = session_of([own_files['weighting']], {**LOGITS, 'samples': samples})
    session.check(IMAGES)
    value, gradient = value_of(session, student)
    ours, theirs = student(IMAGES)[0], teacher(IMAGES)[0]
    weighted = []
    for z, t in zip(ours, theirs, strict=True):
        p = t.softmax(-1)
        certainty = 1 + sum(q * math.log(q) for q in p.tolist()) / math.log(5)
        weighted.append(max(certainty, 0.001) * kl_div(z[None], t[None], temperature=2.0).item())
    assert value == pytest.approx(sum(weighted) / 2, rel=1e-4) and gradient.abs().sum() > 0


def test_a_combination(own_files):
    """Of two teachers the surer one of each image teaches it."""
    student, teachers = Net(0), {'one': Net(1), 'other': Net(2)}
    teachers['other'].linear.weight.data[:, 0] += 20 * torch.sign(teachers['other'].body(IMAGES)[1, 0].mean()).detach()
    term = {**LOGITS, 'teacher': ['one:logits', 'other:logits'], 'combine': 'surest'}
    given = dict(teachers=dict(one=dict(), other=dict()), terms=dict(mine=term), imports=[own_files['combination']])
    session = open_session(student, {n: held(t) for n, t in teachers.items()}, RunOptions.read(given), Host())
    (row,) = session.check(IMAGES)
    value, gradient = value_of(session, student)
    logits = [t(IMAGES)[0] for t in teachers.values()]
    best = torch.stack([z.softmax(-1).amax(-1) for z in logits]).argmax(0).tolist()
    each = [
        kl_div(z[None], logits[k][i][None], temperature=2.0)
        for i, (z, k) in enumerate(zip(student(IMAGES)[0], best, strict=True))
    ]
    assert value == pytest.approx((sum(each) / 2).item(), rel=1e-4) and gradient.abs().sum() > 0
    assert row.teacher == 'one:logits + other:logits (the surest)'


def test_a_teacher(own_files, tmp_path):
    """A kind that the ``teacher`` mapping of every zoo then knows."""
    matrices = [torch.randn(5, IMAGES[0].numel(), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    files = [str(tmp_path / f'{i}.pth') for i in range(2)]
    for matrix, file in zip(matrices, files, strict=True):
        torch.save(dict(weight=matrix), file)
    given = dict(teacher=dict(linear=files), terms=dict(mine=LOGITS), imports=[own_files['teacher']])
    options, student = RunOptions.read(given), Net(0)
    teachers, notes = load_teachers(options.teachers, student, Host(), ULTRALYTICS)
    session = open_session(student, teachers, options, Host())
    session.check(IMAGES)
    value, gradient = value_of(session, student)
    expected = kl_div(student(IMAGES)[0], IMAGES.flatten(1) @ (sum(matrices) / 2).T, temperature=2.0)
    assert value == pytest.approx(expected.item(), rel=1e-4) and gradient.abs().sum() > 0
    assert notes == ['the mean of 2']


@pytest.mark.parametrize(
    'teacher, words',
    [
        (dict(linear='one.pth'), r"teacher\.linear must be a list of files, got 'one\.pth'"),
        (dict(linear=[], checkpoint='x'), "teacher has no option 'checkpoint'"),
        (
            dict(linaer=[]),
            r"teacher must be one of .*dict\(linear=\['one\.pth', 'other\.pth'\]\); got the keys \['linaer'\]",
        ),
    ],
)
def test_near_misses_of_a_teacher(own_files, teacher, words):
    options = RunOptions.read(dict(teacher=teacher, terms=dict(mine=LOGITS), imports=[own_files['teacher']]))
    with pytest.raises(DistillError, match=words) as caught:
        load_teachers(options.teachers, Net(0), Host(), ULTRALYTICS)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize('stride', [1, 2])
def test_a_form(own_files, stride):
    """With its reader and its loss; a teacher of another grid is brought to the student's."""
    session, student, teacher = session_of([own_files['form']], DEPTH, stride)
    (row,) = session.check(IMAGES)
    value, gradient = value_of(session, student)
    theirs = teacher(IMAGES)[1]
    if stride == 2:
        theirs = nn.functional.interpolate(theirs, (8, 8), mode='bilinear')
    gaps = (student(IMAGES)[1].double().log() - theirs.double().log()).flatten(1)
    expected = sum((d * d).mean() - 0.25 * d.mean() ** 2 for d in gaps) / 2
    assert value == pytest.approx(expected.item(), rel=1e-4) and gradient.abs().sum() > 0
    assert row.student_shape == row.teacher_shape == 'depth 8x8'
    # Depth has no classes that would have to be matched.
    assert not session.by_class('')


def test_a_form_gets_full_precision_and_weights_per_image(own_files):
    session, student, teacher = session_of([own_files['form'], own_files['weighting']], DEPTH)
    session.check(IMAGES)
    with torch.autocast('cpu', torch.bfloat16), session.capture() as capture:
        half = student(IMAGES)[1]
    seen = []
    session.terms['mine'].loss.register_forward_pre_hook(lambda _, pair: seen.append([p.metres.dtype for p in pair]))
    session.terms['mine'].samples = lambda ours, theirs, target: torch.tensor([1.0, 0.0])
    value = session.losses(capture, IMAGES, None)['loss_kd_mine']
    assert half.dtype == torch.bfloat16 and seen == [[torch.float32] * 2] * 2
    gap = (half[:1].float().log() - teacher(IMAGES)[1][:1].log()).flatten()
    assert value.item() == pytest.approx((gap.square().mean() - 0.25 * gap.mean() ** 2).item() / 2, rel=1e-4)


def test_a_users_reader_is_asked_before_our_reason_for_having_none(own_files):
    """Ours says of mmseg's depth head that it predicts no classes."""
    pytest.importorskip('mmengine')
    import kd_plugins.mm.segmentation_heads  # noqa: F401

    head = type('VPDDepthHead', (nn.Module,), {'__module__': 'mmseg.models'})()
    resolver_of([own_files['form']])
    assert readable(head, form.form_named('depth'))
    assert not readable(head, PixelPredictions)


ALL = ('loss', 'schedule', 'weighting', 'form', 'combination')


@pytest.mark.parametrize(
    'term, words',
    [
        ({**FEATURES, 'loss': dict(type='LogCosLoss')}, r"loss: there is no loss 'LogCosLoss'; .*'LogCoshLoss'"),
        ({**FEATURES, 'loss': dict(type='LogCoshLoss', scal=1)}, r"no option 'scal'.*'scale'"),
        ({**FEATURES, 'adapter': dict(type='LogCoshLos')}, r"there is no adapter 'LogCoshLos'; .*'LogCoshLoss'"),
        ({**LOGITS, 'weight': dict(type='halvin', start=1)}, r"weight has no schedule type 'halvin': .*'halving'"),
        ({**LOGITS, 'weight': dict(type='halving', start=-1, times=1)}, r'weight\.start must be a finite number >= 0'),
        ({**LOGITS, 'weight': dict(type='halving', start=1)}, r"weight \(halving schedule\).*argument: 'times'"),
        ({**LOGITS, 'samples': 'certainy'}, r"samples has no type 'certainy': .*'certainty'"),
        ({**LOGITS, 'samples': dict(type='certainty', last=1)}, r"samples \(certainty\).*argument 'last'"),
        ({**DEPTH, 'student': 'body'}, r"student 'body': Predictions of Conv2d cannot be read.*form=DepthMaps"),
        ({**DEPTH, 'student': 'logits'}, r'it is a classification head, but this loss compares depth'),
        ({**LOGITS, 'student': 'depth'}, r'it is a depth head, but this loss compares'),
        ({**FEATURES, 'samples': 'certainty'}, r'samples weighs images by what is predicted.*LogCoshLoss compares ten'),
    ],
)
def test_near_misses(own_files, term, words):
    with pytest.raises(DistillError, match=words) as caught:
        session_of([own_files[name] for name in ALL], term)[0].check(IMAGES)
    assert len(str(caught.value)) < 400


def test_a_weighting_returns_a_weight_per_image():
    """(B, 1) weights times (B,) losses would be (B, B)."""
    session, _, _ = session_of([], LOGITS)
    session.terms['mine'].samples = lambda *pair: torch.ones(2, 1)
    with pytest.raises(DistillError, match=r'must return one weight per image, \(2,\), got \(2, 1\)'):
        session.check(IMAGES)


def test_a_name_that_is_also_ours(tmp_path, monkeypatch):
    """Which one is meant is for the user to say; one that they have from us is no other."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'their_losses.py').write_text(
        'from torch import nn\nfrom kd_plugins.losses import PearsonLoss\n\n\nclass FeatureMSELoss(nn.Module):\n'
        '    def forward(self, student, teacher):\n        return (student - teacher).sum()\n'
    )
    resolve = resolver_of(['their_losses'])
    words = r"'FeatureMSELoss' is a loss of kd_plugins and of 'their_losses'; write 'kd_plugins.FeatureMSELoss' or 'the"
    with pytest.raises(DistillError, match=words):
        build_terms(dict(mine={**FEATURES, 'loss': dict(type='FeatureMSELoss')}), resolve)
    for name, module in (
        ('PearsonLoss', 'kd_plugins.losses.pearson'),
        ('kd_plugins.FeatureMSELoss', 'kd_plugins.losses.feature_mse'),
        ('their_losses.FeatureMSELoss', 'their_losses'),
    ):
        terms = build_terms(dict(mine={**FEATURES, 'loss': dict(type=name)}), resolve)
        assert type(terms['mine'].loss).__module__ == module, name


@pytest.mark.parametrize('name', ['classification', 'features'])
def test_a_form_does_not_take_the_place_of_another(name):
    with pytest.raises(DistillError, match=f"the name '{name}' of a form is taken"):
        type('Mine', (Form,), dict(name=name, head='my'))
