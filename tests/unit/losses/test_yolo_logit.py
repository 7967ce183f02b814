"""yolo_logit against its formula in plain loops, and what it compares for which heads."""

import math

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import YOLOLogitLoss, yolo_logit


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def squares(student, teacher):
    """(B, A) lists: mean over the last dimension of the squared difference."""
    return [
        [sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s) for s, t in zip(image_s, image_t, strict=True)]
        for image_s, image_t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]


def mean(loss):
    values = [v for image in loss for v in image]
    return sum(values) / len(values)


def confidence(teacher):
    return [
        [max(map(sigmoid, c)) * sigmoid(o[0]) for c, o in zip(image_c, image_o, strict=True)]
        for image_c, image_o in zip(teacher.cls.tolist(), teacher.obj.tolist(), strict=True)
    ]


@pytest.fixture
def pair(predictions):
    return predictions(seed=0), predictions(seed=1)


def test_formula_uniform(pair):
    student, teacher = pair
    obj, box, cls = (mean(squares(getattr(student, n), getattr(teacher, n))) for n in ('obj', 'box', 'cls'))
    value = yolo_logit(student, teacher, foreground=False)
    assert value.item() == pytest.approx(obj + box + cls, rel=1e-12)
    value = YOLOLogitLoss(obj_weight=2.0, box_weight=0.3, cls_weight=5.0, scale=0.1, foreground=False)(*pair)
    assert value.item() == pytest.approx(0.1 * (2.0 * obj + 0.3 * box + 5.0 * cls), rel=1e-12)


@pytest.mark.parametrize('foreground', [True, 'box'])
def test_formula_with_foreground(pair, weighted_mean, foreground):
    student, teacher = pair
    teacher = teacher.replace(obj=teacher.obj - torch.tensor([6.0, 0.0]).reshape(2, 1, 1))
    weight = confidence(teacher)
    assert sum(weight[0]) < 1 < sum(weight[1])
    obj = mean(squares(student.obj, teacher.obj))
    box = weighted_mean(squares(student.box, teacher.box), weight)
    cls = squares(student.cls, teacher.cls)
    cls = weighted_mean(cls, weight) if foreground is True else mean(cls)
    value = YOLOLogitLoss(2.0, 0.3, 5.0, 0.1, foreground=foreground)(student, teacher)
    assert value.item() == pytest.approx(0.1 * (2.0 * obj + 0.3 * box + 5.0 * cls), rel=1e-12)


def test_foreground_is_the_default_in_both_forms(pair):
    assert yolo_logit(*pair) == yolo_logit(*pair, foreground=True) == YOLOLogitLoss()(*pair)
    assert yolo_logit(*pair) != yolo_logit(*pair, foreground=False)


@pytest.mark.parametrize('name', ['obj', 'box', 'cls'])
def test_weight_zero_skips_the_term(pair, predictions, name):
    """A term that is off may hold anything."""
    student, teacher = pair
    weights = {f'{n}_weight': 0.0 if n == name else 1.0 for n in ('obj', 'box', 'cls')}
    value = yolo_logit(student, teacher, foreground=False, **weights)
    noisy = student.replace(**{name: getattr(student, name) * math.nan})
    assert yolo_logit(noisy, teacher, foreground=False, **weights) == value


def test_decoded_boxes_when_the_codings_differ(pair):
    student, teacher = pair[0], pair[1].replace(box_coding='deltas')
    value = yolo_logit(student, teacher, obj_weight=0, cls_weight=0, foreground=False)
    assert value.item() == pytest.approx(mean(squares(student.ltrb, teacher.ltrb)), rel=1e-12)


@pytest.mark.parametrize('without', [(0,), (1,), (0, 1)])
def test_decoded_boxes_when_a_head_has_no_raw_output(pair, without):
    nothing = {'box': None, 'box_coding': None}
    student, teacher = (p.replace(**nothing) if i in without else p for i, p in enumerate(pair))
    value = yolo_logit(student, teacher, obj_weight=0, cls_weight=0, foreground=False)
    assert value.item() == pytest.approx(mean(squares(student.ltrb, teacher.ltrb)), rel=1e-12)


@pytest.mark.parametrize('blind', ['student', 'teacher'])
def test_boxes_that_cannot_be_compared(predictions, blind):
    pair = {'student': predictions(box_coding='a'), 'teacher': predictions(box_coding='b')}
    pair[blind] = pair[blind].replace(ltrb=None)
    with pytest.raises(DistillError, match=f"student 'a', teacher 'b'.*{blind} has no decoded boxes; .*box_weight=0"):
        yolo_logit(**pair)
    pair[blind] = pair[blind].replace(absent={'ltrb': 'no decoder'})
    with pytest.raises(DistillError, match=rf'{blind} has no decoded boxes \(no decoder\);'):
        yolo_logit(**pair)
    assert yolo_logit(**pair, box_weight=0).item() >= 0


@pytest.mark.parametrize('without', [('student',), ('teacher',), ('student', 'teacher')])
def test_objectness_only_when_both_heads_have_it(pair, without):
    pair = dict(zip(('student', 'teacher'), pair, strict=True))
    expected = yolo_logit(**pair, obj_weight=0, foreground=False)
    for name in without:
        pair[name] = pair[name].replace(obj=None)
    assert yolo_logit(**pair, foreground=False) == expected
    with pytest.raises(DistillError, match='nothing to compare'):
        yolo_logit(**pair, box_weight=0, cls_weight=0)


def test_probabilities_are_compared_as_logits(pair):
    student, teacher = pair
    as_probability = teacher.replace(cls=teacher.cls.sigmoid(), activation='probability')
    options = {'obj_weight': 0, 'box_weight': 0}
    expected = yolo_logit(student, teacher, **options).item()
    assert yolo_logit(student, as_probability, **options).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_probabilities_of_zero_and_one_in_half_precision(predictions, dtype):
    student = predictions(dtype=dtype, requires_grad=True)
    certain = torch.tensor([0.0, 1.0, 1.0], dtype=dtype).expand(2, 8, 3)
    value = yolo_logit(student, predictions(seed=1, dtype=dtype, cls=certain, activation='probability'))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.cls.grad).all()
    student = predictions(dtype=dtype, cls=certain.clone().requires_grad_(), activation='probability')
    value = yolo_logit(student, predictions(seed=1, dtype=dtype))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.cls.grad).all()


def test_faint_confidence_does_not_vanish_in_half_precision(predictions):
    """Class 1e-3 times objectness 1e-5 is 0 in float16 if it is multiplied there."""
    teacher = predictions(
        seed=1, dtype=torch.float16, cls=torch.full((2, 8, 3), -7.0).half(), obj=torch.full((2, 8, 1), -11.0).half()
    )
    student = predictions(dtype=torch.float16)
    assert yolo_logit(student, teacher, obj_weight=0, cls_weight=0).item() > 0


def test_softmax_against_softmax_is_allowed(pair):
    student, teacher = (p.replace(activation='softmax') for p in pair)
    value = yolo_logit(student, teacher, obj_weight=0, box_weight=0, foreground=False)
    assert value.item() == pytest.approx(mean(squares(student.cls, teacher.cls)), rel=1e-12)


@pytest.mark.parametrize('activations', [('softmax', 'sigmoid'), ('probability', 'softmax')])
def test_softmax_against_sigmoid_is_refused(predictions, activations):
    student, teacher = (predictions(activation=a) for a in activations)
    with pytest.raises(DistillError, match='BinaryKLDivLoss') as error:
        yolo_logit(student, teacher)
    assert all(repr(a) in str(error.value) for a in activations)
    assert yolo_logit(student, teacher, cls_weight=0) >= 0


def test_different_class_counts_are_named(predictions):
    with pytest.raises(DistillError, match=r'Class logits .*\(2, 8, 3\).*\(2, 8, 4\)'):
        yolo_logit(predictions(), predictions(classes=4))


def test_mean_over_channels(predictions):
    """Twice the classes with the same differences give the same loss."""
    student, teacher = predictions(seed=0), predictions(seed=1)
    doubled = (p.replace(cls=torch.cat([p.cls, p.cls], -1)) for p in (student, teacher))
    assert yolo_logit(*doubled).item() == pytest.approx(yolo_logit(student, teacher).item(), rel=1e-12)
