"""Options as data: defaults, round trip, and one sentence for each wrong value."""

import math
import pickle
import subprocess
import sys

import pytest

from kd_plugins.distiller import build_terms, resolver_of
from kd_plugins.errors import DistillError
from kd_plugins.losses import (
    AutoBoxLoss,
    BinaryKLDivLoss,
    BoxIoULoss,
    DKDLoss,
    FeatureMSELoss,
    KLDivLoss,
    YOLOLogitLoss,
)
from kd_plugins.yolo import DistillOptions


def test_round_trip():
    ramp = dict(type='linear', start=0.0, end=2.0, until=0.5)
    options = DistillOptions(
        'a.pt',
        cls=ramp,
        box=0,
        class_map={'car': 'auto'},
        classes=('auto', 'bus'),
        stop=3,
        cls_loss=dict(type='DKDLoss'),
    )
    data = options.to_dict()
    assert data['classes'] == ['auto', 'bus'] and data['cls'] == ramp and set(data) == set(DistillOptions.names())
    again = DistillOptions.from_dict(data)
    assert again.to_dict() == data
    assert DistillOptions.from_dict({'teacher': 'a.pt'}) == DistillOptions('a.pt')
    assert pickle.loads(pickle.dumps(options)) == options


def test_yaml_round_trip(tmp_path):
    from ultralytics.utils import YAML

    options = DistillOptions('a.pt', cls=dict(type='cosine', start=1.0, end=0.0), temperature=2)
    YAML.save(tmp_path / 'kd.yaml', options.to_dict())
    assert DistillOptions.from_dict(YAML.load(tmp_path / 'kd.yaml')) == options


BAD = [
    (dict(teacher=None), 'teacher must be the path'),
    (dict(teacher=''), 'teacher must be the path'),
    (dict(cls='abc'), r"cls must be a number or a schedule, got 'abc'"),
    (dict(cls=-1), 'cls must be a finite number >= 0, got -1'),
    (dict(box=math.nan), 'box must be a finite number'),
    (dict(box=True), 'box must be a number'),
    (dict(feature='on'), "feature must be a number or a schedule, got 'on'"),
    (dict(cls=dict(type='linera', start=0, end=1)), "did you mean 'linear'"),
    (dict(obj=1.0), 'obj must stay 0, got 1.0: the heads of Ultralytics have no objectness'),
    (dict(temperature=0), 'temperature must be a finite number > 0'),
    (dict(temperature=dict(type='linear', start=1, end=0)), r'temperature\.end must be a finite number > 0'),
    (dict(box_temperature=-2), 'box_temperature must be'),
    (dict(foreground='yes'), "foreground must be True or False, got 'yes'"),
    (dict(trusted=1), 'trusted must be True or False'),
    (dict(branch='one2two'), "branch has no choice 'one2two': did you mean 'one2one'"),
    (dict(cls_loss='bec'), "cls_loss has no choice 'bec': did you mean 'bce'"),
    (dict(cls_loss=3), 'cls_loss must be one of'),
    (dict(box_loss=dict(temperature=1)), r"box_loss must be dict\(type='...', ...\)"),
    (dict(feature_loss='auto'), "feature_loss has no choice 'auto'"),
    (dict(classes='cat'), 'classes must be a list'),
    (dict(classes=[]), 'classes must be a list'),
    (dict(classes=[1, 2]), r'classes must be names, got \[1, 2\]'),
    (dict(class_map=['a']), 'class_map must be {student name: teacher name}'),
    (dict(class_map={'a': 1}), 'class_map must be'),
    (dict(start=-1), 'start must be a whole number of epochs >= 0, got -1'),
    (dict(start=0.5), 'start must be a whole number'),
    (dict(start=None), 'start must be a whole number'),
    (dict(stop=True), 'stop must be a whole number'),
    (dict(start=3, stop=3), r'stop \(3\) must come after start \(3\)'),
]


@pytest.mark.parametrize('given, message', BAD, ids=[str(g) for g, _ in BAD])
def test_wrong_values_are_refused(given, message):
    with pytest.raises(DistillError, match=message):
        DistillOptions(**{'teacher': 'a.pt', **given})


def test_unknown_and_missing_keys():
    with pytest.raises(DistillError, match=r"kd\.yaml has no option 'teachr': did you mean 'teacher'"):
        DistillOptions.from_dict({'teachr': 'a.pt'}, 'kd.yaml')
    with pytest.raises(DistillError, match=r"kd\.yaml needs 'teacher'"):
        DistillOptions.from_dict({'cls': 1}, 'kd.yaml')
    with pytest.raises(DistillError, match='must be a mapping'):
        DistillOptions.from_dict(['a.pt'])


FACTS = dict(classifier=False, end_to_end=False, masks=False)


RAMP = dict(type='linear', start=4.0, end=1.0)


def terms(facts=FACTS, **given):
    """The terms that options stand for, built."""
    run = DistillOptions('a.pt', **given).expand(**{**FACTS, **facts})
    return build_terms(run.terms, resolver_of(run.imports))


def test_losses():
    found = terms(temperature=2.0, foreground=False, feature=1.0)
    loss = found['cls'].loss
    assert isinstance(loss, BinaryKLDivLoss) and loss.temperature == 2.0 and loss.foreground is False
    assert isinstance(found['box'].loss, AutoBoxLoss) and isinstance(found['feature'].loss, FeatureMSELoss)
    assert isinstance(terms(dict(classifier=True))['cls'].loss, KLDivLoss)
    assert isinstance(terms(box_loss='iou')['box'].loss, BoxIoULoss)
    loss = terms(cls_loss='l2')['cls'].loss
    assert isinstance(loss, YOLOLogitLoss) and (loss.obj_weight, loss.box_weight, loss.cls_weight) == (0, 0, 1)
    loss = terms(cls_loss=dict(type='DKDLoss', beta=2.0))['cls'].loss
    assert isinstance(loss, DKDLoss) and loss.beta == 2.0


def test_schedules_and_weights_that_are_found():
    found = terms(cls='auto:0.5', box=dict(type='step', start=1, gamma=0.1, milestones=[0.5]), temperature=RAMP)
    assert found['cls'].ratio.target == 0.5 and str(found['box'].weight) == '1, times 0.1 at 0.5 of the run'
    assert str(found['cls'].temperature) == '4 -> 1 (linear, 0 to 1 of the run)' and found['box'].temperature is None
    with pytest.raises(DistillError, match="must say at what share of the student's own loss"):
        DistillOptions('a.pt', cls='auto')


def test_losses_that_cannot_be_built():
    def build(**given):
        return terms(**given)

    with pytest.raises(DistillError, match="no loss 'DKDLos'; did you mean 'DKDLoss'"):
        build(cls_loss=dict(type='DKDLos'))
    with pytest.raises(DistillError, match="has no option 'betta'"):
        build(cls_loss=dict(type='DKDLoss', betta=1.0))
    with pytest.raises(DistillError, match='YOLOLogitLoss has no temperature'):
        build(cls_loss='l2', temperature=2.0)
    with pytest.raises(DistillError, match='temperature inside cls_loss'):
        build(cls_loss=dict(type='KLDivLoss'), temperature=2.0)


def weights(**given):
    return {name: str(term.weight) for name, term in terms(**given).items()}


OWN = {
    'cls': dict(loss=dict(type='BinaryKLDivLoss'), student='head', teacher='head', weight=3.0),
    'neck': dict(loss=dict(type='ChannelWiseDivLoss'), student='neck', teacher='neck', weight=2.0),
}


def test_short_options_beside_terms():
    """Only those that are given count; they are the weight of a term of that name, which stays as it is."""
    assert weights(terms=OWN) == {'cls': '3', 'neck': '2'}
    assert weights(terms=OWN, box=1.0) == {'box': '1', 'cls': '3', 'neck': '2'}
    assert weights(terms=OWN, cls=0.5) == {'cls': '0.5', 'neck': '2'}
    assert weights(terms=OWN, cls=0) == {'cls': '0', 'neck': '2'}
    found = terms(terms=OWN, cls=0.5, cls_loss='l2')
    assert isinstance(found['cls'].loss, YOLOLogitLoss) and str(found['cls'].weight) == '0.5'
    both = {'cls': OWN['cls'], 'cls_one2one': OWN['cls']}
    assert weights(terms=both, cls=0.5) == {'cls': '0.5', 'cls_one2one': '0.5'}


@pytest.mark.parametrize(
    'option',
    [
        dict(cls_loss='l2'),
        dict(temperature=2.0),
        dict(box_loss='iou'),
        dict(box_temperature=2.0),
        dict(mask_topk=3),
        dict(feature_loss='cwd'),
        dict(foreground=False),
        dict(branch='both'),
        dict(cls=1.0, box_loss='iou'),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_beside_terms(option):
    name = list(option)[-1]
    with pytest.raises(DistillError, match=f'^{name} belongs to the short options.*write it inside the term'):
        terms(dict(end_to_end=True), terms=OWN, **option)


def test_imports_no_ultralytics():
    code = (
        'import sys, kd_plugins, kd_plugins.yolo\n'
        "options = kd_plugins.yolo.DistillOptions('a.pt', cls_loss='dkd')\n"
        'options.expand(classifier=True, end_to_end=False, masks=False)\n'
        "heavy = {'ultralytics', 'mmengine', 'mmcv', 'mmdet', 'timm', 'kd_plugins.mm'} & set(sys.modules)\n"
        'assert not heavy, heavy'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
