"""What a run adds to the task loss: scaling, factors of branches, precision, adapters, and when it stays out."""

import copy

import pytest
import torch

from kd_plugins.distiller import Position
from kd_plugins.errors import DistillError
from kd_plugins.losses import binary_kl_div, kl_div, localization_distill
from kd_plugins.predictions import read
from kd_plugins.teachers.run import pair_classes
from kd_plugins.yolo.callback import version_tuple
from kd_plugins.yolo.criterion import KDCriterion
from kd_plugins.yolo.heads import head_of
from kd_plugins.yolo.run import COLUMNS, columns
from kd_plugins.yolo.teacher import load_model


def image(batch=3):
    return torch.rand(batch, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def begin_batch(run, epoch=0):
    run.begin_batch(Position(epoch, run.trainer.epochs, epoch))


def outputs(run, epoch=0, batch=3):
    """What the student returns for a batch, of which the run has been told."""
    begin_batch(run, epoch)
    return run.student(image(batch))


def added(run, preds=None, epoch=0, batch=3):
    """``(loss, items)`` before and after."""
    preds = outputs(run, epoch, batch) if preds is None else preds
    loss = torch.tensor([1.0, 2.0, 3.0])
    items = {'box_loss': loss[0], 'cls_loss': loss[1], 'dfl_loss': loss[2]}
    return (loss, items, *run.add(loss, items, preds, {'img': image(batch)}))


def column(run, name, **options):
    """Value of a term in a batch."""
    return added(run, **options)[3][run.columns[name]].item()


def test_values_are_those_of_the_losses_on_the_heads_own_outputs(begin):
    """Computed here from the unfused model in the file, with the head in training mode."""
    run = begin(temperature=2.0)
    preds = outputs(run)
    teacher = load_model(run.callback.options.teacher)
    head_of(teacher).training = True
    with torch.no_grad():
        theirs = read(head_of(teacher), teacher(image()), training=True)
    ours = read(head_of(run.student), preds, training=True)
    weight = theirs.cls.sigmoid().amax(-1)
    expected = {
        'cls': binary_kl_div(ours.cls, theirs.cls, weight, temperature=2.0),
        'box': localization_distill(ours.dist, theirs.dist, weight),
    }
    found = added(run, preds)[3]
    for name, value in expected.items():
        torch.testing.assert_close(found[COLUMNS[name]], value.detach(), rtol=2e-3, atol=1e-5)


def test_scaled_by_the_batch_size_like_the_task_loss(begin):
    single = begin()
    cls, box = column(single, 'cls'), column(single, 'box')
    run = begin(cls=2.0, box=3.0)
    loss, items, total, logged = added(run)
    assert torch.equal(total[:3], loss) and total.shape == (4,)
    assert total[3].item() == pytest.approx(3 * (2 * cls + 3 * box), rel=1e-5)
    assert list(logged) == [*items, 'kdcls_loss', 'kdbox_loss']
    assert logged['kdcls_loss'].item() == pytest.approx(2 * cls, rel=1e-5)
    assert not logged['kdcls_loss'].requires_grad and total.requires_grad


def test_classify_is_a_mean_and_a_scalar(begin):
    run = begin('yolo11n-cls.yaml', 'yolov8n-cls.yaml')
    preds = outputs(run)
    teacher = load_model(run.callback.options.teacher)
    with torch.no_grad():
        theirs = teacher(image())[1]
    loss = torch.tensor(2.0)
    batch = {'img': image(), 'cls': torch.tensor([0, 1, 2])}
    total, logged = run.add(loss, {'loss': loss}, preds, batch)
    assert total.dim() == 0 and list(logged) == ['loss', 'kdcls_loss']
    torch.testing.assert_close(total, 2 + kl_div(preds, theirs), rtol=2e-3, atol=1e-5)


def test_losses_with_targets_under_partly_shared_classes(begin, teacher_file):
    """Images of classes that the teacher does not know are left out of a loss that compares with the label."""
    file = teacher_file('yolov8n-cls.yaml', names=('green', 'cat', 'red'))
    run = begin('yolo11n-cls.yaml', file, cls_loss=dict(type='DKDLoss', beta=0.0))
    preds = outputs(run, batch=2)
    loss = torch.tensor(0.0)
    found = {}
    for labels in ([0, 1], [0, 2], [2, 2]):
        begin_batch(run)
        batch = {'img': image(2), 'cls': torch.tensor(labels)}
        found[tuple(labels)] = run.add(loss, {}, preds, batch)[1]['kdcls_loss'].item()
    assert found[0, 1] > 0 and found[0, 2] > 0 and found[2, 2] == 0


def test_alpha_balances(begin):
    full, run = begin(), begin(alpha=0.25)
    assert column(run, 'cls') == pytest.approx(0.25 * column(full, 'cls'), rel=1e-5)
    loss, _, total, _ = added(run)
    torch.testing.assert_close(total[:3], 0.75 * loss)


def test_columns_fit_ultralytics_table():
    names = ['cls', 'cls_one2one', 'box', 'feature', 'logits', 'logit', 'log_a', 'log_b', 'neck', 'x', '_', 'loss']
    names += [f'term{i}' for i in range(40)]
    found = columns(names)
    assert all(len(c) <= 10 and 'loss' in c for c in found.values()) and list(found) == names
    assert found['cls_one2one'] == found['cls'] == 'kdcls_loss' and found['neck'] == 'kdnec_loss'
    assert len(set(found.values())) == len(names) - 1


OFF = [dict(cls=0, box=0), dict(start=1), dict(stop=1), dict(alpha=0)]


@pytest.mark.parametrize('options', OFF, ids=str)
@pytest.mark.parametrize('feature', [None, 0.0, 1.0])
def test_off_is_the_very_same_tensor(begin, options, feature):
    if feature and 'cls' in options:
        options = {**options, 'feature': dict(type='linear', start=0.0, end=0.0)}
    else:
        options = {**options, 'feature': feature}
    run = begin(**options)
    run.session.teacher.model.forward = None
    epoch = 1 if 'stop' in options else 0
    loss, _, total, logged = added(run, epoch=epoch)
    assert total is loss and run.session.balance.ratio() is None
    assert all(logged[c] == 0 for c in run.columns.values()) and run._capture is None
    assert not [k for k, m in run.student.named_modules() if 'forward' in vars(m)]


def test_a_weight_of_zero_leaves_the_term_out(begin):
    assert list(begin(box=0).columns) == ['cls']
    assert list(begin(cls=0, box=0, feature=1.0).columns) == ['feature']
    assert list(begin(cls=0, box=0).columns) == ['cls', 'box']
    assert list(begin(cls=dict(type='linear', start=0.0, end=1.0)).columns) == ['cls', 'box']


def test_validation_has_no_kd_and_no_columns(begin):
    run = begin()
    preds = outputs(run)
    run.session.teacher.model.forward = None
    with torch.no_grad():
        loss, items, total, logged = added(run, preds)
    assert total is loss and logged is items
    run.student.eval()
    loss, items, total, logged = added(run, preds)
    assert total is loss and logged is items


@pytest.mark.parametrize('branch', ['one2many', 'one2one', 'both'])
def test_branches_have_the_live_factor_of_the_criterion(begin, branch):
    run = begin('small26.yaml', 'wide26.yaml', branch=branch, box_loss='l1')
    criterion = run.student.criterion
    assert type(criterion) is KDCriterion
    run.student.criterion = None  # without a criterion all factors are 1
    preds = outputs(run)
    unweighted = {n: v.item() for n, v in losses(run, preds).items()}
    run.student.criterion = criterion
    first = losses(run, preds)
    criterion.update()
    second = losses(run, preds)
    o2m = (0.8, 0.1 + 0.7 * 2 / 3)
    for found, factor in ((first, o2m[0]), (second, o2m[1])):
        share = {'loss_kd_cls': factor if branch != 'one2one' else 1 - factor, 'loss_kd_cls_one2one': 1 - factor}
        for name in share.keys() & found.keys():
            assert found[name].item() == pytest.approx(share[name] * unweighted[name], rel=1e-5)
    assert len(first) == (4 if branch == 'both' else 2) and set(run.columns.values()) == {'kdcls_loss', 'kdbox_loss'}
    reached = [k for k, g in gradients(run, sum(first.values())).items() if g]
    assert any('one2one' in k for k in reached) == (branch != 'one2many')
    assert any('.cv3.' in k for k in reached) == (branch != 'one2one')
    # Ultralytics cuts the one-to-one branch off the backbone.
    assert ('model.0.conv.weight' in reached) == (branch != 'one2one')


def losses(run, preds):
    capture = run.session.capture(known=run.session.student_modules)
    capture.modules[run._head] = head_of(run.student)
    capture.put(run._head, preds, training=True)
    return run.session.losses(capture, image(), {'img': image()})


def test_columns_of_two_branches_are_their_sum(begin):
    run = begin('small26.yaml', 'wide26.yaml', branch='both', box_loss='l1')
    preds = outputs(run)
    values = losses(run, preds)
    logged = added(run, preds)[3]
    expected = (values['loss_kd_cls'] + values['loss_kd_cls_one2one']).item()
    assert logged['kdcls_loss'].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('branch', ['one2one', 'both'])
def test_a_teacher_with_one_branch_teaches_all(begin, branch):
    run = begin('small26.yaml', 'wide.yaml', branch=branch)
    assert all(v > 0 for v in losses(run, outputs(run)).values())


def gradients(run, value):
    named = dict(run.student.named_parameters())
    found = torch.autograd.grad(value, named.values(), allow_unused=True)
    return {k: g is not None and bool(g.abs().sum() > 0) for k, g in zip(named, found, strict=True)}


@pytest.mark.parametrize('options', [{}, dict(feature=1.0)], ids=str)
def test_autocast_runs_the_teacher_in_half_and_the_losses_in_float32(begin, options):
    run = begin(teacher='small.yaml', **options)
    exact = added(run)[3]
    begin_batch(run)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        preds = run.student(image())
        assert preds['scores'].dtype == torch.bfloat16
        _, _, total, logged = added(run, preds)
    assert run.session.teacher.dtype == torch.bfloat16 and total.dtype == logged['kdcls_loss'].dtype == torch.float32
    for name in run.columns.values():
        assert logged[name].item() == pytest.approx(exact[name].item(), rel=0.1)


def test_the_teacher_follows_the_memory_format_of_the_student(begin, trainer):
    found = trainer()
    found.model.to(memory_format=torch.channels_last)
    weight = begin(found).session.teacher.model.model[1].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_start_changes_nothing(trainer, begin, teacher_file):
    found, file = trainer('yolo26n.yaml'), teacher_file('yolo11n.yaml')
    before = copy.deepcopy(found.model)
    modes = [m.training for m in found.model.modules()]
    state = torch.get_rng_state()
    begin(found, file, feature=1.0)
    assert torch.equal(torch.get_rng_state(), state) and modes == [m.training for m in found.model.modules()]
    for (k, a), b in zip(found.model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), k
    assert head_of(found.model).shape == head_of(before).shape  # no anchors of the dry run are left in the head
    assert not [k for k, m in found.model.named_modules() if 'forward' in vars(m)]
    assert [id(p) for g in found.optimizer.param_groups for p in g['params']] == [
        id(p) for p in found.model.parameters()
    ]


def test_box_loss_that_fits(begin):
    kinds = {}
    for student, teacher in (
        ('yolo11n.yaml', 'yolov8n.yaml'),
        ('yolo26n.yaml', 'yolov8n.yaml'),
        ('yolo26n-obb.yaml',) * 2,
    ):
        kinds[student, teacher] = type(begin(student, teacher).session.terms['box'].loss).__name__
    assert list(kinds.values()) == ['LocalizationDistillLoss', 'BoxIoULoss', 'BoxL1Loss']


def test_balance(begin):
    run = begin()
    balance = run.session.balance
    assert balance.ratio() is None
    _, _, total, _ = added(run)
    added(run)
    assert balance.ratio() == pytest.approx(total[3].item() / 6, rel=1e-5)
    assert balance.ratio() is None
    balance.add(torch.tensor(float('nan')), torch.tensor(1.0))
    assert balance.ratio() is None


def test_balance_without_labels_says_nothing(begin):
    """With box=0, cls=0 and dfl=0 of Ultralytics there is no task loss to compare with: that is what was asked for."""
    run = begin()
    preds = outputs(run)
    run.add(torch.zeros(3), {}, preds, {'img': image()})
    assert run.session.balance.verdict() is None


def summary_of(begin, caplog, *given, **options):
    with caplog.at_level('INFO', logger='ultralytics'):
        begin(*given, **options)
    return '\n'.join(r.getMessage() for r in caplog.records)


def test_common_strides_only(begin, caplog):
    assert 'strides 8/16/32' in summary_of(begin, caplog, 'small-p2.yaml', 'wide.yaml')


def test_nothing_in_common(begin):
    run = begin()
    head_of(run.session.teacher.model).stride = torch.tensor([5.0, 10.0, 20.0])
    with pytest.raises(DistillError, match='no level in common'):
        run.session.check(image())


@pytest.mark.parametrize(
    'cfg, text',
    [('yolo11n-pose.yaml', 'not taught: keypoints'), ('yolo11n-obb.yaml', 'not taught: angles')],
)
def test_what_is_not_taught_is_said(begin, caplog, cfg, text):
    assert text in summary_of(begin, caplog, cfg, cfg)


def test_nothing_is_left_out_of_a_detector(begin, caplog):
    assert 'not taught' not in summary_of(begin, caplog)


# ------------------------------------------------------------------ class sets
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
    assert pair_classes(student, teacher, mapping, student_count=2, teacher_count=2) == expected


def test_equal_numbers_of_different_names_are_refused():
    with pytest.raises(DistillError, match=r"no class in common: the student has 'a', 'b'.*class_map={student name"):
        pair_classes(['a', 'b'], ['x', 'y'], None, student_count=2, teacher_count=2)
    with pytest.raises(DistillError, match="'a' and 'b' of the student would both be the teacher's 'x'; map one"):
        pair_classes(['a', 'b'], ['x', 'y'], {'a': 'x', 'b': 'x'}, student_count=2, teacher_count=2)


def test_a_map_onto_a_class_of_the_same_name_names_both():
    with pytest.raises(DistillError, match="'green' and 'blue' of the student would both be the teacher's 'blue'"):
        pair_classes(['green', 'blue'], ['blue', 'red'], {'green': 'blue'}, student_count=2, teacher_count=2)


@pytest.mark.parametrize('classes, taught', [([0, 2], [0, 2]), ([1], [1]), (2, [2]), (None, None)])
def test_classes_of_the_run_restrict_what_is_taught(begin, teacher_file, classes, taught, caplog):
    with caplog.at_level('INFO', logger='ultralytics'):
        run = begin(run=dict(classes=classes))
    found = run.session.classes['']
    assert found == (None if taught is None else (taught, taught))
    preds = outputs(run)
    preds['scores'].retain_grad()
    total = run.add(torch.zeros(3), {}, preds, {'img': image()})[0]
    total.sum().backward()
    reached = [i for i, g in enumerate(preds['scores'].grad.abs().sum((0, 2))) if g > 0]
    assert reached == (taught or [0, 1, 2])
    text = '\n'.join(r.getMessage() for r in caplog.records)
    assert ('not taught: ' in text) == (taught is not None)


def test_classes_that_the_teacher_does_not_know(begin, teacher_file):
    file = teacher_file('small.yaml', names=('red', 'cat'))
    with pytest.raises(DistillError, match=r'The teacher knows none of the classes that classes=\[...\]'):
        begin(teacher=file, run=dict(classes=[1, 2]))


def test_classes_do_not_restrict_a_classifier(begin):
    """Ultralytics' data sets of whole images have no such filter, so the labels of all classes train there."""
    run = begin('yolo11n-cls.yaml', 'yolov8n-cls.yaml', run=dict(classes=[0]))
    assert run.session.classes[''] is None


def test_version_tuple():
    assert version_tuple('8.4.190') == (8, 4, 190) and version_tuple('8.5') == (8, 5) > (8, 4, 140)
    assert version_tuple('8.4.140.dev1') == (8, 4, 140) > version_tuple('8.4.99')
