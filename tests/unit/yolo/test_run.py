"""What a run adds to the task loss: scaling, factors of branches, precision, adapters, and when it stays out."""

import copy

import pytest
import torch

from kd_plugins.distiller import Position
from kd_plugins.errors import DistillError
from kd_plugins.losses import binary_kl_div, kl_div, localization_distill
from kd_plugins.predictions import read
from kd_plugins.teachers.pseudo import PseudoLabels
from kd_plugins.teachers.run import pair_classes
from kd_plugins.yolo.callback import version_tuple
from kd_plugins.yolo.criterion import KDCriterion
from kd_plugins.yolo.heads import head_of
from kd_plugins.yolo.run import COLUMNS, columns, with_labels
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
    assert list(logged) == [*items, 'kdcls_loss', 'kdbox_loss', 'kd_ratio']
    assert logged['kd_ratio'].item() == pytest.approx(total[3].item() / loss.sum().item(), rel=1e-5)
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
    assert total.dim() == 0 and list(logged) == ['loss', 'kdcls_loss', 'kd_ratio']
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
    capture.put(run._head, preds, training=True, module=head_of(run.student))
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


# ------------------------------------------------------------------ what a teacher cannot teach
@pytest.mark.parametrize(
    'student, teacher, options, message',
    [
        ('small.yaml', 'yolov8n-cls.yaml', {}, 'student is a detector and the teacher a classifier'),
        ('yolo11n-cls.yaml', 'small.yaml', {}, 'student is a classifier and the teacher a detector'),
        ('yolo11n-obb.yaml', 'small.yaml', {}, r'leave the boxes out \(weight 0\)'),
        ('small.yaml', 'yolo11n-obb.yaml', {}, r'leave the boxes out \(weight 0\)'),
        (
            'small.yaml',
            'yolo11n-obb.yaml',
            dict(box_loss='ld'),
            r'rotated axes, in strides, those of the student are not',
        ),
    ],
)
def test_refused(begin, student, teacher, options, message):
    with pytest.raises(DistillError, match=message) as error:
        begin(student, teacher, **options)
    assert len(str(error.value)) < 400


def test_a_classifier_may_teach_its_features(begin):
    term = dict(loss=dict(type='ChannelWiseDivLoss'), student='stages[-1]', teacher='stages[-1]')
    run = begin('small.yaml', 'yolov8n-cls.yaml', terms={'fea': term})
    assert column(run, 'fea') > 0


def test_the_classes_of_rotated_boxes_are_taught(begin):
    assert column(begin('small.yaml', 'yolo11n-obb.yaml', box=0), 'cls') > 0


# ------------------------------------------------------------------ features and their adapters
FEATURE_LOSSES = ['mse', 'cwd', 'pkd', 'mgd', 'cosine']


@pytest.mark.parametrize('loss', FEATURE_LOSSES)
def test_features_of_other_widths_train_student_and_adapters(begin, loss):
    run = begin(cls=0, box=0, feature=2.0, feature_loss=loss)
    total, items = added(run)[2:]
    assert items['kdfea_loss'] > 0
    total[3].backward()
    assert run.student.model[0].conv.weight.grad.any() and not any(
        p.grad is not None and p.grad.any() for p in head_of(run.student).parameters()
    )
    for name, p in run.session.bank.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    assert run.session.trainable


TAPS = [
    ('small.yaml', 'wide26.yaml', 'neck', 'neck', '24x8x8, 48x4x4, 64x2x2', ''),
    ('small-p2.yaml', 'wide.yaml', 'neck', 'neck', '24x8x8, 48x4x4', 'strides 8/16/32; not 4 of the student'),
    ('small-p4.yaml', 'wide.yaml', 'neck', 'neck', '48x4x4, 64x2x2', 'strides 16/32; not 8 of the teacher'),
    ('small.yaml', 'small-p2.yaml', 'neck', 'neck', '16x8x8', 'strides 8/16/32; not 4 of the teacher'),
    ('small.yaml', 'wide.yaml', 'model.3', 'model.3', '48x4x4', ''),
    ('small.yaml', 'wide.yaml', 'stages[-1]', 'backbone', '64x2x2', ''),
]


@pytest.mark.parametrize('student, teacher, tap, other, shapes, note', TAPS, ids=[f'{t[0]}-{t[2]}' for t in TAPS])
def test_levels_are_paired_by_stride_and_the_others_named(begin, caplog, student, teacher, tap, other, shapes, note):
    term = dict(loss=dict(type='ChannelWiseDivLoss'), student=tap, teacher=other)
    text = summary_of(begin, caplog, student, teacher, terms={'fea': term})
    assert shapes in text and note in text and ('; not' in text) == bool(note)


def step(run, epoch=0, backward=True):
    """A training step on a batch."""
    total = added(run, epoch=epoch)[2]
    if backward:
        total.sum().backward()
        run.trainer.optimizer.step()
        run.trainer.optimizer.zero_grad()
    return total


def weights_of(run):
    return {k: v.clone() for k, v in run.session.bank.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[k], two[k]) for k in one)


def test_adapters_step_with_the_students_optimizer(begin):
    run = begin(feature=1.0)
    before = weights_of(run)
    total = added(run)[2]
    total.sum().backward()
    assert same(before, weights_of(run))
    run.trainer.optimizer.step()
    after = weights_of(run)
    assert not any(torch.equal(before[k], after[k]) for k in before) and run.session.optimizer.steps == 1
    run.trainer.optimizer.zero_grad()
    assert all(p.grad is None for p in run.session.bank.parameters())
    run.callback.teardown(run.trainer)
    step_student = run.trainer.optimizer
    step_student.step()
    assert same(after, weights_of(run)) and type(run.student.criterion).__name__ == 'v8DetectionLoss'


def test_an_optimizer_that_is_built_anew_takes_the_adapters_along(begin):
    """After an out-of-memory error the trainer makes another one; gradients of the failed batch are gone."""
    run = begin(feature=1.0)
    run.begin_epoch(run.trainer)
    step(run)
    state = run.session.state()
    added(run)[2].sum().backward()
    assert any(p.grad is not None for p in run.session.bank.parameters())
    old, run.trainer.optimizer = run.trainer.optimizer, torch.optim.SGD(run.student.parameters(), 0.01, momentum=0.9)
    run.trainer.optimizer.zero_grad()
    run.begin_epoch(run.trainer)
    assert all(p.grad is None for p in run.session.bank.parameters())
    again = run.session.state()
    assert same(state['adapters'], again['adapters']) and again['steps'] == 1 and again['optimizer']
    old.step()
    assert run.session.optimizer.steps == 1
    step(run)
    assert run.session.optimizer.steps == 2


def test_an_epoch_that_is_done_again_begins_with_the_adapters_it_began_with(begin):
    run = begin(feature=1.0)
    trainer, states = run.trainer, []
    for epoch in range(2):
        trainer.epoch = epoch
        run.callback.on_train_epoch_start(trainer)
        states.append(weights_of(run))
        step(run, epoch)
        run.callback.on_train_epoch_end(trainer)
    for _ in range(2):  # it may fail more than once
        run.callback.on_train_epoch_start(trainer)
        assert same(states[1], weights_of(run))
        step(run, 1)
        run.callback.on_train_epoch_end(trainer)
    trainer.epoch = 2
    end = weights_of(run)
    run.callback.on_train_epoch_start(trainer)
    assert same(end, weights_of(run)) and not same(end, states[1])


@pytest.mark.parametrize('moved', [False, True])
@pytest.mark.parametrize('last', [0, 1])
def test_resume_restores_the_adapters_of_the_epoch_in_last_pt(begin, trainer, last, moved, tmp_path):
    """The process may end between writing the adapters of an epoch and last.pt; and a run may be moved."""
    run = begin(feature=1.0)
    states = []
    for epoch in range(2):
        run.trainer.epoch = epoch
        run.callback.on_train_epoch_start(run.trainer)
        step(run, epoch)
        run.callback.on_train_epoch_end(run.trainer)
        states.append(run.session.state())
    resumed = trainer()
    resumed.resume, resumed.start_epoch, resumed.epoch = True, last + 1, last + 1
    if moved:
        run.trainer.wdir.rename(tmp_path / 'elsewhere')
        resumed.wdir.mkdir()
        resumed.args.model = str(tmp_path / 'elsewhere' / 'last.pt')
    again = begin(resumed, feature=1.0).session.state()
    assert same(states[last]['adapters'], again['adapters']) and again['steps'] == last + 1
    for name, state in states[last]['optimizer'].items():
        assert torch.equal(state['momentum_buffer'], again['optimizer'][name]['momentum_buffer'])


def test_resume_without_the_adapters(begin, trainer):
    def resume(**options):
        found = trainer()
        found.resume, found.start_epoch = True, 1
        return begin(found, **options)

    with pytest.raises(DistillError, match=r"resume needs the adapters of the run.*kd_last.pt' does not exist"):
        resume(feature=1.0)
    resume(feature=1.0, teacher='small.yaml')  # has none
    resume()
    run = begin(feature=1.0)
    run.trainer.epoch = 3
    step(run)
    run.callback.on_train_epoch_end(run.trainer)
    with pytest.raises(DistillError, match=r'holds the adapters of epochs \[3\], and last.pt is of epoch 0'):
        resume(feature=1.0)
    run.trainer.epoch = 0
    run.callback.on_train_epoch_end(run.trainer)
    with pytest.raises(DistillError, match='are not those of this config'):
        resume(feature=1.0, feature_loss='mgd')


def test_nothing_is_written_without_adapters_or_when_nothing_is_saved(begin):
    for options, given in ((dict(), dict()), (dict(save=False), dict(feature=1.0))):
        run = begin(run=options, **given)
        step(run)
        run.callback.on_train_epoch_end(run.trainer)
        assert not list(run.trainer.wdir.iterdir())


# ------------------------------------------------------------------ on, but nothing is distilled
def test_a_criterion_that_is_never_called_stops_the_run(begin):
    run = begin()
    run.student.criterion = None
    for _ in range(2):
        run.callback.on_train_batch_start(run.trainer)
    with pytest.raises(DistillError, match='on for 2 iterations, but somebody replaced the criterion of'):
        run.callback.on_train_batch_start(run.trainer)


def test_a_model_with_its_own_loss_is_named(begin, trainer):
    found = trainer()

    class Own(type(found.model)):
        def loss(self, batch, preds=None):
            return torch.zeros(3), {}

    found.model.__class__ = Own
    run = begin(found)
    for _ in range(2):
        run.callback.on_train_batch_start(run.trainer)
    with pytest.raises(DistillError, match=r'but Own has a loss\(\) of its own that never calls self.criterion'):
        run.callback.on_train_batch_start(run.trainer)


def test_a_batch_that_is_done_again_was_not_missed(begin):
    """An epoch begins anew with smaller batches, up to three times, when the student ran out of memory."""
    run = begin()
    for _ in range(4):
        run.callback.on_train_epoch_start(run.trainer)
        run.callback.on_train_batch_start(run.trainer)
    assert added(run)[3]['kdcls_loss'] > 0


def test_a_run_that_was_off_says_so_at_its_end(begin, caplog):
    run = begin(start=2)
    added(run)
    # After a crash, which says enough by itself, only this one is called.
    run.callback.teardown(run.trainer)
    assert 'not distilled' not in caplog.text
    run = begin(start=2)
    added(run)
    run.callback.on_train_end(run.trainer)
    assert 'This run was not distilled: KD (from 2 to the end) was never computed.' in caplog.text
    caplog.clear()
    for options in (dict(), dict(cls=0, box=0)):
        run = begin(**options)
        added(run)
        run.callback.on_train_end(run.trainer)
        assert 'not distilled' not in caplog.text


def test_a_callback_on_two_models_at_the_same_time(begin, trainer, tmp_path):
    run = begin()
    other = trainer('small26.yaml')
    run.callback.on_pretrain_routine_end(other)
    second = run.callback._runs[other]
    second.trainer = other
    assert all(added(r)[3]['kdcls_loss'] > 0 for r in (run, second)) and second.student is not run.student
    run.callback.teardown(other)
    assert type(other.model.criterion).__name__ == 'E2ELoss' and type(run.student.criterion) is KDCriterion
    assert added(run)[3]['kdcls_loss'] > 0


def test_a_limit_of_time_decides_the_number_of_epochs(begin):
    with pytest.raises(DistillError, match='start=9 is not before the end of the run'):
        begin(start=9)
    begin(start=9, run=dict(time=0.1))


def test_a_student_that_is_its_teacher_is_a_note(begin, trainer, teacher_file, caplog):
    """So do people begin who add classes to a model without forgetting, or prune it."""
    found = trainer()
    file = teacher_file('small.yaml')
    found.model.load_state_dict(load_model(file).state_dict())
    with caplog.at_level('INFO', logger='ultralytics'):
        run = begin(found, file)
    assert 'student and teacher are equal so far: only what the labels change will be held back' in caplog.text
    found.model.model[0].conv.weight.data *= 2
    assert added(run)[3]['kdcls_loss'] > 0


def test_version_tuple():
    assert version_tuple('8.4.190') == (8, 4, 190) and version_tuple('8.5') == (8, 5) > (8, 4, 140)
    assert version_tuple('8.4.140.dev1') == (8, 4, 140) > version_tuple('8.4.99')


def test_detections_join_the_labels_image_by_image():
    """The criterion counts on labels that come image by image."""
    batch = dict(
        img=torch.zeros(2, 3, 40, 80),
        cls=torch.tensor([[3.0], [4.0]]),
        bboxes=torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.1, 0.1]]),
        batch_idx=torch.tensor([0.0, 1.0]),
        im_file=['a', 'b'],
    )
    # The first is the object that has a label, whatever it is taken for.
    found = [torch.tensor([[0, 0, 40, 38, 0.9, 1], [60, 10, 80, 30, 0.8, 2]]), torch.zeros(0, 6)]
    out = with_labels(batch, found, PseudoLabels())
    assert out['cls'].flatten().tolist() == [3, 2, 4] and out['cls'].shape == (3, 1)
    assert out['batch_idx'].tolist() == [0, 0, 1]
    torch.testing.assert_close(out['bboxes'][1], torch.tensor([70 / 80, 0.5, 20 / 80, 0.5]))
    assert torch.equal(out['bboxes'][[0, 2]], batch['bboxes']) and out['im_file'] is batch['im_file']
    assert len(batch['cls']) == 2, 'the batch of the run stays as it was'
