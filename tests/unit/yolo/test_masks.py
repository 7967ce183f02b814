"""Assembled masks: read like the heads' own, comparable across models, cropped, capped, and learnt from."""

import copy

import pytest
import torch
from torch.nn.functional import interpolate

from kd_plugins.errors import DistillError
from kd_plugins.losses import mask_kl_div
from kd_plugins.predictions import DensePredictions
from kd_plugins.yolo import DistillOptions
from kd_plugins.yolo.heads import grid_points, head_of, select_branch
from kd_plugins.yolo.losses import YOLODistiller
from kd_plugins.yolo.masks import assemble, inside_boxes, pair_masks
from kd_plugins.yolo.teacher import build_teacher, load_model

SIZES, STRIDES = ((4, 6), (2, 3)), (8.0, 16.0)  # of an image of 32 x 48
ANCHORS = 4 * 6 + 2 * 3


def image(batch=2, size=(64, 96)):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raw(masks=4, size=(8, 12), seed=0, batch=2):
    """Raw predictions of a made-up segment head."""
    return {
        'feats': [torch.zeros(batch, 0, *s) for s in SIZES],
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


def pair(ours, theirs, topk=5, strides=(STRIDES, STRIDES)):
    return pair_masks(ours, theirs, *strides, teacher_predictions(), topk)


def loss(masks):
    return mask_kl_div(masks.student, masks.teacher, masks.inside, masks.weight)


# ------------------------------------------------------------------ what the heads predict
@pytest.mark.parametrize('cfg', ['yolov8n-seg.yaml', 'yolo11n-seg.yaml', 'yolo26n-seg.yaml'])
def test_teacher_returns_what_the_model_in_the_file_does(teacher_file, cfg):
    path = teacher_file(cfg)
    teacher = build_teacher(path, branches=('one2many', 'one2one'), masks=True)
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
    teacher = build_teacher(teacher_file('yolov8n-seg-p6.yaml'), masks=True)
    call = teacher(image(size=(96, 160)), None, [teacher.head]).call(teacher.head)
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


def test_levels_in_another_order_or_that_the_student_lacks():
    ours, theirs = raw(), raw(seed=3)
    expected = pair(ours, theirs)
    cells = [h * w for h, w in SIZES]
    turned = {
        **theirs,
        'feats': [torch.zeros(2, 0, 1, 2), *theirs['feats'][::-1]],
        'mask_coefficient': torch.cat([random(2, 4, 2), *theirs['mask_coefficient'].split(cells, 2)[::-1]], 2),
    }
    masks = pair(ours, turned, strides=(STRIDES, (32.0, 16.0, 8.0)))
    assert torch.equal(masks.teacher, expected.teacher)


def test_semantic_logits_of_yolo26_are_left_alone():
    ours = raw()
    expected = pair(ours, raw(seed=3))
    masks = pair({**ours, 'proto': (ours['proto'], random(2, 3, 8, 12))}, raw(seed=3))
    assert torch.equal(masks.student, expected.student)


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
        return {k: v if k == 'feats' else (v * 100).to(dtype) for k, v in outputs.items()}

    ours, theirs = half(raw()), half(raw(seed=3))
    masks = pair(ours, theirs)
    assert masks.student.dtype == torch.float32 and torch.isfinite(loss(masks))
    exact = pair(*({k: v if k == 'feats' else v.float() for k, v in o.items()} for o in (ours, theirs)))
    assert torch.equal(masks.student, exact.student)


def test_boxes_outside_the_image():
    boxes = torch.tensor([[[-50.0, -50.0, 6.0, 6.0], [1000.0, 0.0, 2000.0, 5.0], [8.0, 8.0, 4.0, 4.0]]])
    inside = inside_boxes(boxes, (8, 8), (4.0, 4.0))
    assert inside.sum((2, 3)).tolist() == [[1, 0, 0]]


# ------------------------------------------------------------------ the term
@pytest.fixture
def distiller(build, teacher_file):
    def make(student='yolo26n-seg.yaml', teacher='yolo11n-seg.yaml', masks=True, **options):
        path = teacher_file(teacher)
        options = DistillOptions(path, **options)
        model = copy.deepcopy(build(student)).train()
        found = YOLODistiller(model, build_teacher(path, masks=masks), options)
        found.rows = found.check(image())
        return found

    return make


@pytest.mark.parametrize('student', ['yolov8n-seg.yaml', 'yolo26n-seg.yaml'])
@pytest.mark.parametrize('teacher', ['yolo11n-seg.yaml', 'yolo26n-seg.yaml'])
def test_term_trains_mask_layers(distiller, student, teacher):
    kd = distiller(student, teacher, cls=0, box=0)
    values = kd.compute(kd.student(image()), image())
    assert set(values) == {'mask'} and values['mask'] > 0
    values['mask'].backward()
    head = head_of(kd.student)
    for part in (head.proto.cv3, head.cv4):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in head.cv3.parameters())
    row = next(r for r in kd.rows if r.name == 'kdmsk_loss')
    assert len(row.name) <= 10 and row.student_shape == row.teacher_shape == '32 prototypes of 16x24'


def test_descent_on_the_term_lowers_it(distiller):
    kd = distiller('yolov8n-seg.yaml', cls=0, box=0)
    head = head_of(kd.student)
    optimizer = torch.optim.Adam([*head.proto.parameters(), *head.cv4.parameters()], lr=1e-3)
    values = []
    for _ in range(8):
        value = kd.compute(kd.student(image()), image())['mask']
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


def test_on_by_default_where_both_have_masks(distiller):
    assert [t.name for t in distiller().terms] == ['cls', 'box', 'mask']
    assert [t.name for t in distiller(teacher='yolo11n.yaml').terms] == ['cls', 'box']
    assert [t.name for t in distiller('yolo11n.yaml', masks=False).terms] == ['cls', 'box']
    assert [t.name for t in distiller(mask=0, masks=False).terms] == ['cls', 'box']


@pytest.mark.parametrize(
    'student, teacher, options, message',
    [
        ('yolo11n.yaml', 'yolo11n-seg.yaml', dict(mask=1.0), r'the student \(Detect\) predicts no masks'),
        ('yolo11n-seg.yaml', 'yolo11n.yaml', dict(mask=1.0), r'the teacher \(Detect\) predicts no masks'),
        ('yolo11n-cls.yaml', 'yolov8n-cls.yaml', dict(mask=1.0), 'leave box, mask and feature out'),
        ('yolo11n-seg.yaml', 'yolo11n-seg.yaml', dict(mask=-1.0), 'mask'),
        ('yolo11n-seg.yaml', 'yolo11n-seg.yaml', dict(mask_topk=0), 'mask_topk must be a whole number >= 1, got 0'),
    ],
)
def test_refused(distiller, student, teacher, options, message):
    with pytest.raises(DistillError, match=message):
        distiller(student, teacher, **options)
