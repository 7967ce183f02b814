"""Assembled masks: read like the heads' own, comparable across models, cropped, capped, and learnt from."""

import copy

import pytest
import torch
from torch.nn.functional import interpolate

from kd_plugins.distiller import Position, Tap
from kd_plugins.errors import DistillError
from kd_plugins.losses import mask_kl_div
from kd_plugins.predictions import DensePredictions, MaskPredictions, read
from kd_plugins.predictions.masks import assemble, inside_boxes, pair_masks
from kd_plugins.yolo.heads import BRANCHES, grid_points, head_of, is_end_to_end, select_branch
from kd_plugins.yolo.teacher import load_model, load_teacher

SIZES, STRIDES = ((4, 6), (2, 3)), (8.0, 16.0)  # of an image of 32 x 48
ANCHORS = 4 * 6 + 2 * 3


def image(batch=2, size=(64, 96)):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raw(masks=4, size=(8, 12), seed=0, batch=2):
    """Raw predictions of masks of a made-up segment head."""
    return {
        'mask_coefficient': random(batch, masks, ANCHORS, seed=seed),
        'proto': random(batch, masks, *size, seed=seed + 1),
    }


def teacher_predictions(batch=2):
    cls = random(batch, ANCHORS, 3, seed=5)
    return DensePredictions(
        cls=cls,
        activation='sigmoid',
        level_sizes=SIZES,
        strides=STRIDES,
        points=grid_points(tuple(SIZES), tuple(STRIDES), cls.device, cls.dtype),
        ltrb=random(batch, ANCHORS, 4, seed=6).abs() + 0.3,
    )


def predictions(outputs, dense=None):
    dense = teacher_predictions(len(outputs['proto'])) if dense is None else dense
    return MaskPredictions(dense.replace(coefficients=outputs['mask_coefficient'].transpose(1, 2)), outputs['proto'])


def pair(ours, theirs, topk=5):
    ours, theirs = (predictions(o) if isinstance(o, dict) else o for o in (ours, theirs))
    return pair_masks(*MaskPredictions.align(ours, theirs), topk)


def loss(masks):
    return mask_kl_div(masks.student, masks.teacher, masks.inside, masks.weight)


def teach_masks(path):
    """A loaded teacher of which masks are asked, of every branch that it has."""
    teacher = load_teacher(path)
    taps = [f'head.{b}' for b in BRANCHES] if is_end_to_end(head_of(teacher.model)) else ['head']
    teacher.expect([(teacher.tap(Tap(tap)), MaskPredictions) for tap in taps])
    return teacher


# ------------------------------------------------------------------ what the heads predict
@pytest.mark.parametrize('cfg', ['yolov8n-seg.yaml', 'yolo11n-seg.yaml', 'yolo26n-seg.yaml'])
def test_teacher_returns_what_the_model_in_the_file_does(teacher_file, cfg):
    path = teacher_file(cfg)
    teacher = teach_masks(path)
    found = teacher.outputs(image(), None, [teacher.head]).call(teacher.head).output
    model = load_model(path)
    head_of(model).training = True
    with torch.no_grad():
        expected = model(image())
    for branch in ('one2many', 'one2one'):
        ours, theirs = select_branch(found, branch), select_branch(expected, branch)
        torch.testing.assert_close(ours['mask_coefficient'], theirs['mask_coefficient'], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(ours['proto'], theirs['proto'], atol=2e-3, rtol=2e-3)


def test_padding_for_a_deeper_pyramid_is_cut_off_the_prototypes(teacher_file):
    teacher = teach_masks(teacher_file('yolov8n-seg-p6.yaml'))
    call = teacher.outputs(image(size=(96, 160)), None, [teacher.head]).call(teacher.head)
    found = select_branch(call.output)
    padded = torch.full((2, 3, 128, 192), 114 / 255)
    padded[:, :, :96, :160] = image(size=(96, 160))
    whole = select_branch(teacher.outputs(padded, None, [teacher.head]).call(teacher.head).output)
    torch.testing.assert_close(found['proto'], whole['proto'][..., :24, :40])
    # Stride 8: 12 of 16 rows and 20 of 24 columns.
    level = whole['mask_coefficient'][..., : 16 * 24].unflatten(2, (16, 24))[..., :12, :20]
    torch.testing.assert_close(found['mask_coefficient'][..., : 12 * 20], level.flatten(2))


@pytest.mark.parametrize('cfg', ['yolov8n-seg.yaml', 'yolo26n-seg.yaml'])
def test_assembled_as_ultralytics_does(build, cfg):
    from ultralytics.utils.ops import process_mask

    model = copy.deepcopy(build(cfg))
    head_of(model).training = True
    with torch.no_grad():
        found = select_branch(model(image()))
    coefficients = found['mask_coefficient'][:, :, :7].transpose(1, 2)
    proto = found['proto'][0] if isinstance(found['proto'], tuple) else found['proto']
    everything = torch.tensor([[0.0, 0.0, 96.0, 64.0]]).expand(7, 4)
    for i in range(2):
        expected = process_mask(proto[i], coefficients[i], everything, (64, 96))
        assert torch.equal(assemble(coefficients, proto)[i] > 0, expected.bool())


# ------------------------------------------------------------------ the pair
def test_masks_of_the_most_confident_anchors():
    ours, theirs, teacher = raw(), raw(seed=3), teacher_predictions()
    masks = pair(ours, theirs)
    for b in range(2):
        order = teacher.confidence()[b].argsort(descending=True)[:5]
        torch.testing.assert_close(masks.weight[b], teacher.confidence()[b, order])
        for k, a in enumerate(order.tolist()):
            for side, source in (('student', ours), ('teacher', theirs)):
                expected = sum(source['mask_coefficient'][b, m, a] * source['proto'][b, m] for m in range(4))
                torch.testing.assert_close(getattr(masks, side)[b, k], expected)
            x1, y1, x2, y2 = teacher.boxes()[b, a].tolist()
            for row in range(8):  # 4 pixels of the image per mask pixel
                for column in range(12):
                    x, y = 4 * column + 2, 4 * row + 2
                    assert masks.inside[b, k, row, column] == (x1 <= x < x2 and y1 <= y < y2)


def test_other_numbers_and_sizes_of_prototypes():
    ours, theirs = raw(), raw(masks=7, size=(16, 24), seed=3)
    masks = pair(ours, theirs)
    assert masks.student.shape == masks.teacher.shape == masks.inside.shape == (2, 5, 8, 12)
    best = teacher_predictions().confidence().topk(5, 1).indices
    coefficients = theirs['mask_coefficient'].transpose(1, 2).gather(1, best[..., None].expand(-1, -1, 7))
    expected = interpolate(assemble(coefficients, theirs['proto']), (8, 12), mode='bilinear')
    torch.testing.assert_close(masks.teacher, expected)


def test_prototypes_that_are_mixed_differently_make_the_same_masks():
    """Coefficients alone are meaningless: any invertible mix of the prototypes is undone by them."""
    ours, mix = raw(), random(4, 4, seed=9) + 3 * torch.eye(4)
    theirs = {
        **ours,
        'proto': torch.einsum('nm,bmhw->bnhw', mix, ours['proto']),
        'mask_coefficient': torch.einsum('mn,bma->bna', torch.linalg.inv(mix), ours['mask_coefficient']),
    }
    assert (ours['mask_coefficient'] - theirs['mask_coefficient']).abs().mean() > 0.3
    assert loss(pair(ours, theirs)).item() == pytest.approx(0, abs=1e-6)


def segment_head(strides):
    """What a reader asks of a segment head."""
    head = type('Segment', (torch.nn.Module,), {'__module__': 'ultralytics.nn.modules.head'})()
    head.reg_max, head.nc, head.stride = 1, 3, torch.tensor(strides)
    return head


def whole(outputs, dense, sizes=SIZES):
    """Raw outputs of a segment head with masks and what `dense` says."""
    return {
        **outputs,
        'boxes': dense.ltrb.transpose(1, 2),
        'scores': dense.cls.transpose(1, 2),
        'feats': [torch.zeros(2, 0, *s) for s in sizes],
    }


def test_levels_in_another_order_or_that_the_student_lacks():
    ours, theirs, dense = raw(), raw(seed=3), teacher_predictions()
    expected = pair(ours, theirs)
    cells = [h * w for h, w in SIZES]
    straight = whole(theirs, dense)
    turned = {
        key: torch.cat([random(2, straight[key].shape[1], 2), *straight[key].split(cells, 2)[::-1]], 2)
        for key in ('boxes', 'scores', 'mask_coefficient')
    }
    turned |= {'proto': theirs['proto'], 'feats': [torch.zeros(2, 0, 1, 2), *straight['feats'][::-1]]}
    found = read(segment_head((32.0, 16.0, 8.0)), turned, training=True, form=MaskPredictions)
    masks = pair(ours, found)
    torch.testing.assert_close(masks.teacher, expected.teacher)
    assert torch.equal(masks.weight, expected.weight) and torch.equal(masks.inside, expected.inside)


def test_semantic_logits_of_yolo26_are_left_alone():
    ours, dense = whole(raw(), teacher_predictions()), teacher_predictions()
    expected = pair(raw(), raw(seed=3))
    both = {**ours, 'proto': (ours['proto'], random(2, 3, 8, 12))}
    found = read(segment_head(STRIDES), both, training=True, form=MaskPredictions)
    assert torch.equal(pair(found, predictions(raw(seed=3), dense)).student, expected.student)


def test_number_of_masks_is_capped():
    assert pair(raw(), raw(), topk=3).student.shape[1] == 3
    assert pair(raw(), raw(), topk=1000).student.shape[1] == ANCHORS


def test_gradient_reaches_coefficients_and_prototypes_of_the_student_only():
    ours, theirs = raw(), raw(seed=3)
    leaves = [side[k].requires_grad_() for side in (ours, theirs) for k in ('mask_coefficient', 'proto')]
    loss(pair(ours, theirs)).backward()
    assert leaves[0].grad.any() and leaves[1].grad.any() and leaves[2].grad is None and leaves[3].grad is None


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_assembled_in_float32(dtype):
    def half(outputs):
        return {k: (v * 100).to(dtype) for k, v in outputs.items()}

    ours, theirs = half(raw()), half(raw(seed=3))
    masks = pair(ours, theirs)
    assert masks.student.dtype == torch.float32 and torch.isfinite(loss(masks))
    exact = pair(*({k: v.float() for k, v in o.items()} for o in (ours, theirs)))
    assert torch.equal(masks.student, exact.student)


def test_boxes_outside_the_image():
    boxes = torch.tensor([[[-50.0, -50.0, 6.0, 6.0], [1000.0, 0.0, 2000.0, 5.0], [8.0, 8.0, 4.0, 4.0]]])
    inside = inside_boxes(boxes, (8, 8), (4.0, 4.0))
    assert inside.sum((2, 3)).tolist() == [[1, 0, 0]]


# ------------------------------------------------------------------ the term
@pytest.fixture
def segment(begin):
    """``segment(student, teacher, **options)``: a `Run` of two segment models, by default."""

    def make(student='yolo26n-seg.yaml', teacher='yolo11n-seg.yaml', **options):
        return begin(student, teacher, **options)

    return make


def added(run):
    """What a batch adds to a task loss of 0."""
    run.begin_batch(Position(0, 4, 0))
    preds = run.student(image())
    total, items = run.add(torch.zeros(3), {}, preds, {'img': image()})
    return total.sum() / 2, items


@pytest.mark.parametrize('student', ['yolov8n-seg.yaml', 'yolo26n-seg.yaml'])
@pytest.mark.parametrize('teacher', ['yolo11n-seg.yaml', 'yolo26n-seg.yaml'])
def test_term_trains_mask_layers(segment, student, teacher, caplog):
    with caplog.at_level('INFO', logger='ultralytics'):
        run = segment(student, teacher, cls=0, box=0)
    total, items = added(run)
    assert set(items) == {'kdmsk_loss', 'kd_ratio'} and items['kdmsk_loss'] > 0
    total.backward()
    head = head_of(run.student)
    for part in (head.proto.cv3, head.cv4):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in head.cv3.parameters())
    text = '\n'.join(r.getMessage() for r in caplog.records)
    assert text.count('32 prototypes of 16x16') == 2 and len('kdmsk_loss') <= 10


def test_descent_on_the_term_lowers_it(segment):
    run = segment('yolov8n-seg.yaml', cls=0, box=0)
    head = head_of(run.student)
    optimizer = torch.optim.Adam([*head.proto.parameters(), *head.cv4.parameters()], lr=1e-3)
    values = []
    for _ in range(8):
        value = added(run)[0]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize('branch', ['one2one', 'both'])
def test_masks_of_each_branch(segment, branch):
    run = segment('yolo26n-seg.yaml', 'yolo26n-seg.yaml', cls=0, box=0, branch=branch)
    assert list(run.session.terms) == (['mask'] if branch == 'one2one' else ['mask', 'mask_one2one'])
    total = added(run)[0]
    total.backward()
    head = head_of(run.student)
    for layers, learns in ((head.one2one_cv4, True), (head.cv4, branch == 'both')):
        assert any(p.grad is not None and p.grad.any() for p in layers.parameters()) == learns


def test_on_by_default_where_both_have_masks(segment):
    assert list(segment().session.terms) == ['cls', 'box', 'mask']
    assert list(segment(teacher='yolo11n.yaml').session.terms) == ['cls', 'box']
    assert list(segment('yolo11n.yaml').session.terms) == ['cls', 'box']
    assert list(segment(mask=0).session.terms) == ['cls', 'box']
    assert list(segment(cls=0, box=0, mask=0).session.terms) == ['cls', 'box']


@pytest.mark.parametrize(
    'student, teacher, options, message',
    [
        ('yolo11n.yaml', 'yolo11n-seg.yaml', dict(mask=1.0), 'student and teacher must both predict masks'),
        ('yolo11n-seg.yaml', 'yolo11n.yaml', dict(mask=1.0), 'student and teacher must both predict masks'),
        ('yolo11n-cls.yaml', 'yolov8n-cls.yaml', dict(mask=1.0), 'leave box, mask and feature out'),
        ('yolo11n-seg.yaml', 'yolo11n-seg.yaml', dict(mask=-1.0), 'mask'),
        ('yolo11n-seg.yaml', 'yolo11n-seg.yaml', dict(mask_topk=0), 'mask_topk must be a whole number >= 1, got 0'),
    ],
)
def test_refused(segment, student, teacher, options, message):
    with pytest.raises(DistillError, match=message):
        segment(student, teacher, **options)
