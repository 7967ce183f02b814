"""box_l1 and box_iou against plain loops over corners."""

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import BoxIoULoss, BoxL1Loss, box_iou, box_l1


def distances(seed=0, batch=2, positions=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, positions, 4, generator=generator, dtype=torch.float64) * 3 + 0.2


def l1_by_hand(student, teacher):
    return [
        [sum(abs(a - b) for a, b in zip(s, t, strict=True)) / 4 for s, t in zip(image_s, image_t, strict=True)]
        for image_s, image_t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]


def one_minus_giou(s, t, point=(10.0, 20.0)):
    """On corners, with areas of intersection, union and hull."""

    def corners(d):
        return point[0] - d[0], point[1] - d[1], point[0] + d[2], point[1] + d[3]

    def area(box):
        return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)

    a, b = corners(s), corners(t)
    inner = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    union = area(a) + area(b) - inner
    return 1 - (inner / union - (hull - union) / hull)


def iou_by_hand(student, teacher):
    return [
        [one_minus_giou(s, t) for s, t in zip(image_s, image_t, strict=True)]
        for image_s, image_t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]


def mean(loss):
    values = [v for image in loss for v in image]
    return sum(values) / len(values)


CASES = pytest.mark.parametrize(
    'function, module, by_hand', [(box_l1, BoxL1Loss, l1_by_hand), (box_iou, BoxIoULoss, iou_by_hand)]
)


@CASES
def test_formula_uniform(predictions, function, module, by_hand):
    student, teacher = distances(0), distances(1)
    expected = mean(by_hand(student, teacher))
    assert function(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    pair = (predictions(ltrb=d, box=None, box_coding=None) for d in (student, teacher))
    assert module(foreground=False)(*pair).item() == pytest.approx(expected, rel=1e-9)


@CASES
def test_formula_with_foreground(predictions, weighted_mean, function, module, by_hand):
    student, teacher = (predictions(seed=i, ltrb=distances(i), box=None, box_coding=None) for i in range(2))
    teacher = teacher.replace(obj=teacher.obj - torch.tensor([6.0, 0.0]).reshape(2, 1, 1))
    weight = teacher.cls.sigmoid().amax(-1) * teacher.obj[..., 0].sigmoid()
    assert weight[0].sum() < 1 < weight[1].sum()
    expected = weighted_mean(by_hand(student.ltrb, teacher.ltrb), weight.tolist())
    assert module()(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert function(student.ltrb, teacher.ltrb, weight).item() == pytest.approx(expected, rel=1e-9)


def test_iou_with_numbers():
    """Halves of one box that touch: no intersection, the hull is their union, so GIoU is 0."""
    left, right = torch.tensor([[[2.0, 1.0, 0.0, 1.0]]]), torch.tensor([[[0.0, 1.0, 2.0, 1.0]]])
    assert box_iou(left, right).item() == pytest.approx(1.0)
    assert box_iou(left, 2 * left).item() == pytest.approx(0.75)


def test_iou_does_not_depend_on_size():
    student, teacher = distances(0), distances(1)
    assert box_iou(5 * student, 5 * teacher).item() == pytest.approx(box_iou(student, teacher).item(), rel=1e-9)
    assert box_l1(5 * student, 5 * teacher).item() == pytest.approx(5 * box_l1(student, teacher).item(), rel=1e-9)


@pytest.mark.parametrize('broken', [[-1.0, -1.0, -1.0, -1.0], [0.0] * 4, [-3.0, 2.0, 1.0, 2.0], [1e9] * 4])
def test_iou_of_inverted_boxes_is_finite(broken):
    student, teacher = distances(0), distances(1)
    for s, t in ((torch.tensor(broken).double().expand_as(teacher), teacher), (student, torch.tensor(broken).double())):
        s = s.clone().requires_grad_()
        value = box_iou(s, t.expand_as(s))
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(s.grad).all() and 0 <= value <= 2


def test_l1_compares_raw_outputs_of_the_same_coding(predictions):
    student, teacher = predictions(seed=0), predictions(seed=1)
    expected = mean(l1_by_hand(student.box, teacher.box))
    assert BoxL1Loss(foreground=False)(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    other = teacher.replace(box_coding='another')
    expected = mean(l1_by_hand(student.ltrb, teacher.ltrb))
    assert BoxL1Loss(foreground=False)(student, other).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('role', ['student', 'teacher'])
@pytest.mark.parametrize('module', [BoxL1Loss, BoxIoULoss])
def test_heads_without_decoded_boxes_are_refused(predictions, module, role):
    pair = {'student': predictions(), 'teacher': predictions(seed=1, box_coding='another')}
    pair[role] = pair[role].replace(ltrb=None, absent={'ltrb': 'its boxes are rotated'})
    with pytest.raises(DistillError, match=rf'{role}.*its boxes are rotated'):
        module()(**pair)
