"""What the distiller adds to the task loss: scaling, factors of branches, precision, and when it stays out."""

import copy

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import binary_kl_div, localization_distill
from kd_plugins.predictions import read
from kd_plugins.yolo import DistillOptions
from kd_plugins.yolo.callback import pair_classes, version_tuple
from kd_plugins.yolo.criterion import KDCriterion
from kd_plugins.yolo.heads import head_of
from kd_plugins.yolo.losses import COLUMNS, YOLODistiller
from kd_plugins.yolo.teacher import build_teacher, load_model


def image(batch=3):
    return torch.rand(batch, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def distiller(build, teacher_file):
    """``distiller(student, teacher, **options)``: checked, on a student in training mode."""

    def make(student='yolo11n.yaml', teacher='yolov8n.yaml', **options):
        path = teacher_file(teacher)
        options = DistillOptions(path, **options)
        branches = {'both': ('one2many', 'one2one')}.get(options.branch, (options.branch,))
        model = copy.deepcopy(build(student)).train()
        found = YOLODistiller(model, build_teacher(path, branches=branches), options)
        found.rows = found.check(image())
        return found

    return make


def outputs(distiller, batch=3):
    return distiller.student(image(batch))


def added(distiller, preds=None, batch=3):
    preds = outputs(distiller, batch) if preds is None else preds
    loss = torch.tensor([1.0, 2.0, 3.0])
    items = {'box_loss': loss[0], 'cls_loss': loss[1], 'dfl_loss': loss[2]}
    return (loss, items, *distiller.add(loss, items, preds, {'img': image(batch)}))


def test_values_are_those_of_the_losses_on_the_heads_own_outputs(distiller):
    """Computed here from the unfused model in the file, with the head in training mode."""
    kd = distiller(temperature=2.0)
    preds = outputs(kd)
    teacher = load_model(kd.options.teacher)
    head_of(teacher).training = True
    with torch.no_grad():
        theirs = read(head_of(teacher), teacher(image()), training=True)
    ours = read(head_of(kd.student), preds, training=True)
    weight = theirs.cls.sigmoid().amax(-1)
    expected = {
        'cls': binary_kl_div(ours.cls, theirs.cls, weight, temperature=2.0),
        'box': localization_distill(ours.dist, theirs.dist, weight),
    }
    found = kd.compute(preds, image())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=1e-5)


def test_scaled_by_the_batch_size_like_the_task_loss(distiller):
    kd = distiller(cls=2.0, box=3.0)
    single = kd.compute(outputs(kd), image())
    loss, items, total, logged = added(kd)
    assert torch.equal(total[:3], loss) and total.shape == (4,)
    assert total[3].item() == pytest.approx(3 * (single['cls'] + single['box']).item(), rel=1e-5)
    assert list(logged) == [*items, 'kdcls_loss', 'kdbox_loss']
    assert logged['kdcls_loss'].item() == pytest.approx(single['cls'].item(), rel=1e-5)
    assert not logged['kdcls_loss'].requires_grad and total.requires_grad


def test_columns_fit_ultralytics_table():
    assert all(len(c) <= 10 and 'loss' in c for c in COLUMNS.values())


@pytest.mark.parametrize('options', [dict(cls=0, box=0), dict(start=1), dict(stop=1)])
def test_off_is_the_very_same_tensor(distiller, options):
    kd = distiller(**options)
    kd.epoch = 1 if 'stop' in options else 0
    kd.teacher.model.forward = None
    loss, _, total, logged = added(kd)
    assert total is loss and logged['kdcls_loss'] == logged['kdbox_loss'] == 0 and kd.balance() is None


def test_validation_has_no_kd_and_no_columns(distiller):
    kd = distiller()
    preds = outputs(kd)
    kd.teacher.model.forward = None
    with torch.no_grad():
        loss, items, total, logged = added(kd, preds)
    assert total is loss and logged is items
    kd.student.eval()
    loss, items, total, logged = added(kd, preds)
    assert total is loss and logged is items


@pytest.mark.parametrize('branch', ['one2many', 'one2one', 'both'])
def test_branches_have_the_live_factor_of_the_criterion(distiller, branch):
    from ultralytics.cfg import get_cfg

    kd = distiller('yolo26n.yaml', 'yolo26n.yaml', branch=branch, box_loss='l1')
    kd.student.args = get_cfg()
    kd.student.args.epochs = 5
    preds = outputs(kd)
    unweighted = kd.compute(preds, image())  # without a criterion all factors are 1
    kd.student.criterion = KDCriterion(kd.student.init_criterion(), kd.add)
    first = kd.compute(preds, image())
    kd.student.criterion.update()
    second = kd.compute(preds, image())
    o2m = (0.8, 0.1 + 0.7 * 3 / 4)
    for value, factor in ((first, o2m[0]), (second, o2m[1])):
        if branch == 'both':
            continue
        share = factor if branch == 'one2many' else 1 - factor
        assert value['cls'].item() == pytest.approx(share * unweighted['cls'].item(), rel=1e-5)
    reached = [k for k, g in gradients(kd, first['cls'] + first['box']).items() if g]
    assert any('one2one' in k for k in reached) == (branch != 'one2many')
    assert any('.cv3.' in k for k in reached) == (branch != 'one2one')
    # Ultralytics cuts the one-to-one branch off the backbone.
    assert ('model.0.conv.weight' in reached) == (branch != 'one2one')


def gradients(kd, value):
    named = dict(kd.student.named_parameters())
    found = torch.autograd.grad(value, named.values(), allow_unused=True)
    return {k: g is not None and bool(g.abs().sum() > 0) for k, g in zip(named, found, strict=True)}


def test_autocast_runs_the_teacher_in_half_and_the_losses_in_float32(distiller):
    kd = distiller()
    exact = kd.compute(outputs(kd), image())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        preds = outputs(kd)
        assert preds['scores'].dtype == torch.bfloat16
        _, _, total, logged = added(kd, preds)
    assert kd.teacher.dtype == torch.bfloat16 and total.dtype == logged['kdcls_loss'].dtype == torch.float32
    for name in ('cls', 'box'):
        assert logged[COLUMNS[name]].item() == pytest.approx(exact[name].item(), rel=0.1)


def test_check_changes_nothing(distiller):
    kd = distiller('yolo26n.yaml')
    before = copy.deepcopy(kd.student)
    modes = [m.training for m in kd.student.modules()]
    state = torch.get_rng_state()
    kd.check(image())
    assert torch.equal(torch.get_rng_state(), state) and modes == [m.training for m in kd.student.modules()]
    for (k, a), b in zip(kd.student.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), k
    assert head_of(kd.student).shape == head_of(before).shape  # no anchors of the dry run are left in the head
    assert 'forward' not in head_of(kd.student).__dict__


def test_box_loss_that_fits(distiller):
    kinds = {}
    for student, teacher in (
        ('yolo11n.yaml', 'yolov8n.yaml'),
        ('yolo26n.yaml', 'yolov8n.yaml'),
        ('yolo26n-obb.yaml',) * 2,
    ):
        kinds[student, teacher] = distiller(student, teacher).rows[1].loss
    assert list(kinds.values()) == ['LocalizationDistillLoss', 'BoxIoULoss', 'BoxL1Loss']


def test_balance(distiller):
    kd = distiller()
    assert kd.balance() is None
    _, _, total, _ = added(kd)
    added(kd)
    assert kd.balance() == pytest.approx(total[3].item() / 6, rel=1e-5)
    assert kd.balance() is None
    kd._watch(torch.tensor(float('nan')), torch.tensor(1.0))
    assert kd.balance() is None


def test_common_strides_only(distiller):
    kd = distiller('yolov8n-p2.yaml', 'yolo11n.yaml')
    assert 'strides 8/16/32' in kd.rows[0].student_shape


def test_nothing_in_common(distiller, build, teacher_file):
    kd = distiller()
    head_of(kd.teacher.model).stride = torch.tensor([5.0, 10.0, 20.0])
    with pytest.raises(DistillError, match='no level in common'):
        kd.check(image())


@pytest.mark.parametrize(
    'student, teacher, mapping, expected',
    [
        (['a', 'b'], ['a', 'b'], None, None),
        (['a', 'b'], ['b', 'a'], None, ([0, 1], [1, 0])),
        (['a', 'b'], ['x', 'a'], None, ([0], [1])),
        (['a', 'b'], ['x', 'y'], {'a': 'y'}, ([0], [1])),
        (['a', 'b'], ['x', 'y'], {'a': 'x', 'b': 'y'}, None),
        (None, ['x', 'y'], None, None),
    ],
)
def test_pair_classes(student, teacher, mapping, expected):
    assert pair_classes(student, teacher, mapping, 2, 2) == expected


def test_equal_numbers_of_different_names_are_refused():
    with pytest.raises(DistillError, match=r"no class in common: the student has 'a', 'b'.*class_map={student name"):
        pair_classes(['a', 'b'], ['x', 'y'], None, 2, 2)
    with pytest.raises(DistillError, match="two classes named 'x'"):
        pair_classes(['a', 'b'], ['x', 'y'], {'a': 'x', 'b': 'x'}, 2, 2)


def test_version_tuple():
    assert version_tuple('8.4.190') == (8, 4, 190) and version_tuple('8.5') == (8, 5) > (8, 4, 140)
    assert version_tuple('8.4.140.dev1') == (8, 4, 140) > version_tuple('8.4.99')
