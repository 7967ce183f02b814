"""Two heads' predictions at the same positions and for the same classes."""

from __future__ import annotations

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.lab.benchmark.measure import Operators
from kd_plugins.predictions import DensePredictions, align, match_classes

LEVELS = {8.0: (4, 6), 16.0: (2, 3), 32.0: (1, 2), 64.0: (1, 1)}


def make(strides=(8.0, 16.0), priors=1, offset=0.0, classes=3, activation='sigmoid', batch=2, seed=0, bins=False):
    """Random predictions whose points sit at ``offset`` of the cell."""
    generator = torch.Generator().manual_seed(seed)
    sizes = tuple(LEVELS[s] for s in strides)
    points = []
    for (h, w), s in zip(sizes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
        points.append(((torch.stack([x, y], -1).reshape(-1, 2) + offset) * s).repeat_interleave(priors, 0))
    points = torch.cat(points)
    total = len(points)

    def rand(*last):
        return torch.randn(batch, total, *last, generator=generator)

    cls = rand(classes + (activation == 'softmax'))
    return DensePredictions(
        cls=cls.sigmoid() if activation == 'probability' else cls,
        activation=activation,
        level_sizes=sizes,
        strides=strides,
        points=points,
        obj=rand(1),
        ltrb=rand(4),
        dist=rand(4, 5) if bins else None,
        box=rand(4),
        box_coding='toy',
        num_priors=priors,
    )


def test_same_form_is_returned_unchanged():
    student, teacher = make(seed=1), make(seed=2, bins=True)
    s, t = align(student, teacher)
    assert s is student
    for name in ('cls', 'obj', 'ltrb', 'dist', 'box', 'points'):
        assert torch.equal(getattr(t, name), getattr(teacher, name)), name


def test_other_points_keep_boxes_in_pixels():
    student, teacher = make(offset=0.5), make(offset=0.0, seed=1, bins=True)
    s, t = align(student, teacher)
    torch.testing.assert_close(t.boxes(), teacher.boxes())
    assert torch.equal(t.points, s.points)
    torch.testing.assert_close(t.ltrb - teacher.ltrb, torch.tensor([0.5, 0.5, -0.5, -0.5]).expand_as(t.ltrb))
    assert t.dist is None and t.box is None and t.box_coding is None
    with pytest.raises(DistillError, match="points are not the student's"):
        t.require('dist')


def test_common_strides_only():
    student, teacher = make((8.0, 16.0, 32.0)), make((16.0, 32.0, 64.0), seed=1)
    s, t = align(student, teacher)
    assert s.strides == t.strides == (16.0, 32.0)
    torch.testing.assert_close(s.boxes(), student.boxes()[:, 24:])
    torch.testing.assert_close(t.boxes(), teacher.boxes()[:, :8])


def test_most_confident_of_three_priors():
    student, teacher = make(), make(priors=3, offset=0.5, seed=1, bins=True)
    s, t = align(student, teacher)
    assert t.num_priors == 1 and t.cls.shape == s.cls.shape and torch.equal(t.points, s.points)
    confidence, boxes = teacher.confidence(), teacher.boxes()
    for b in range(2):
        for location in range(t.cls.shape[1]):
            best = 3 * location + confidence[b, 3 * location : 3 * location + 3].argmax()
            assert torch.equal(t.cls[b, location], teacher.cls[b, best])
            assert torch.equal(t.obj[b, location], teacher.obj[b, best])
            torch.testing.assert_close(t.boxes()[b, location], boxes[b, best])
    assert (t.box is None and '3 priors' in t.absent['box']) or 'points' in t.absent['box']


def test_bins_of_the_picked_prior_are_kept_when_points_agree():
    student, teacher = make(), make(priors=2, seed=1, bins=True)
    _, t = align(student, teacher)
    best = teacher.confidence().unflatten(1, (-1, 2)).argmax(-1)
    assert torch.equal(t.dist[1, 5], teacher.dist[1, 10 + best[1, 5]])
    assert t.box is None and '2 priors' in t.absent['box']


def test_three_student_priors_share_the_teachers_prediction():
    student, teacher = make(priors=3, offset=0.5), make(seed=1)
    _, t = align(student, teacher)
    assert t.num_priors == 3
    torch.testing.assert_close(t.boxes(), teacher.boxes().repeat_interleave(3, 1))
    assert torch.equal(t.cls[:, 4], teacher.cls[:, 1])


def test_equal_numbers_of_priors_are_paired():
    student, teacher = make(priors=3), make(priors=3, seed=1)
    _, t = align(student, teacher)
    assert torch.equal(t.cls, teacher.cls) and torch.equal(t.box, teacher.box)


def test_classes_by_index():
    student, teacher = make(classes=3), make(classes=5, seed=1)
    s, t = align(student, teacher, ([0, 2], [4, 1]))
    assert torch.equal(s.cls, student.cls[..., [0, 2]]) and torch.equal(t.cls, teacher.cls[..., [4, 1]])


@pytest.mark.parametrize('activation', ['softmax', 'probability'])
def test_other_activation_becomes_binary_logits(activation):
    student, teacher = make(), make(activation=activation, seed=1)
    s, t = align(student, teacher)
    assert s.activation == t.activation == 'sigmoid' and s.cls.shape == t.cls.shape
    torch.testing.assert_close(t.cls.sigmoid(), teacher.class_probabilities())
    assert torch.equal(s.cls, student.cls)
    both = align(teacher, teacher)[0]
    assert both.activation == activation and both.cls is teacher.cls


def test_gradients_reach_the_student_only_through_what_is_kept():
    student, teacher = make((8.0, 16.0)), make((16.0,), offset=0.5, seed=1)
    student.ltrb.requires_grad_()
    s, t = align(student, teacher)
    (s.boxes() - t.boxes()).square().sum().backward()
    assert student.ltrb.grad[:, :24].eq(0).all() and student.ltrb.grad[:, 24:].ne(0).all()


@pytest.mark.parametrize(
    'student, teacher, classes, message',
    [
        (make((8.0,)), make((16.0,)), None, r'no level in common: strides \(8\.0,\) and \(16\.0,\)'),
        (make(batch=1), make(batch=2), None, '1 images and the teacher for 2'),
        (make(priors=2), make(priors=3), None, '2 priors per location and the teacher 3'),
        (make(classes=3), make(classes=4), None, 'student predicts 3 classes and the teacher 4'),
        (make(), make(), ([0], [0, 1]), 'equal length'),
        (make(), make(), ([], []), 'non-empty'),
        (make(), make(), ([0], [7]), r'Class index 7 is outside 0\.\.2'),
    ],
)
def test_what_cannot_be_aligned(student, teacher, classes, message):
    with pytest.raises(DistillError, match=message):
        align(student, teacher, classes)


def test_different_input_sizes():
    teacher = make((8.0,))
    wider = teacher.replace(level_sizes=((6, 4),))
    with pytest.raises(DistillError, match='At stride 8 the student has 4x6 cells and the teacher 6x4'):
        align(teacher, wider)


@pytest.mark.parametrize(
    'student, teacher, expected',
    [
        (['a', 'b'], ['a', 'b'], None),
        (['a', 'b'], ['b', 'a'], ([0, 1], [1, 0])),
        (['a', 'x', 'b'], ['c', 'b', 'a'], ([0, 2], [2, 1])),
        (['Cat', 'dog'], ['DOG', 'cat'], ([0, 1], [1, 0])),
        (['cat', 'Cat'], ['CAT', 'Cat'], ([0, 1], [0, 1])),
    ],
)
def test_match_classes(student, teacher, expected):
    assert match_classes(student, teacher) == expected


def test_match_unknown_names():
    assert match_classes(None, None, student_count=80, teacher_count=80) is None
    assert match_classes(['a', 'b'], None, teacher_count=2) is None
    with pytest.raises(DistillError, match=r'student has 2 classes and the teacher 80.*classes=\[\.\.\.\] in teacher'):
        match_classes(['a', 'b'], None, teacher_count=80)
    with pytest.raises(DistillError, match=r'classes=\[\.\.\.\] in student'):
        match_classes(None, ['a', 'b'], student_count=3)


def test_disjoint_classes_show_some_of_both():
    with pytest.raises(DistillError, match=r"'a', 'b', 'c', 'd', 'e', \.\.\. \(6\), the teacher 'x'"):
        match_classes(list('abcdef'), ['x'])


def test_names_that_contradict():
    with pytest.raises(DistillError, match="The teacher's head predicts 3 classes, but 2 class names"):
        match_classes(['a', 'b'], ['a', 'b'], teacher_count=3)
    with pytest.raises(DistillError, match="two classes named 'a'"):
        match_classes(['a', 'a'], ['a', 'b'])


def test_objectness_of_one_side_is_multiplied_into_its_classes():
    student, teacher = make(seed=1), make(seed=2).replace(obj=None)
    s, t = align(student, teacher)
    assert s.obj is None and t is not None
    torch.testing.assert_close(s.cls.sigmoid(), student.cls.sigmoid() * student.obj.sigmoid())
    torch.testing.assert_close(s.confidence(), student.confidence())
    with pytest.raises(DistillError, match='no objectness'):
        s.require('obj')


def test_folded_objectness_is_finite_with_gradients_at_extreme_scores():
    student = make(seed=1)
    cls = torch.full_like(student.cls, 200.0).requires_grad_()
    for sign in (1, -1):
        folded = student.replace(cls=sign * cls, obj=torch.full_like(student.obj, -sign * 200.0)).fold_objectness()
        (grad,) = torch.autograd.grad(folded.cls.sum(), cls)
        assert torch.isfinite(folded.cls).all() and torch.isfinite(grad).all()


def test_centerness_is_not_objectness():
    student, teacher = make(seed=1), make(seed=2).replace(obj_coding='centerness')
    s, t = align(student, teacher)
    assert s.obj is None and t.obj is not None
    torch.testing.assert_close(t.cls, teacher.cls)


@pytest.mark.parametrize(
    'teacher',
    [
        dict(offset=0.0, bins=True),
        dict(offset=0.5, strides=(8.0, 16.0, 32.0, 64.0), bins=True),
        dict(offset=0.5, priors=3),
    ],
    ids=['other points', 'other levels', 'other priors'],
)
def test_points_are_compared_once_and_never_again(teacher):
    # On a GPU every comparison stalls the queue. Readers give the same points in every iteration.
    student, teacher = make(offset=0.5), make(seed=1, **teacher)
    first = align(student, teacher)
    with Operators() as count:
        again = align(student, teacher)
    assert count.waiting == 0
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.boxes(), other.boxes())


def test_bins_of_other_distances_are_not_compared():
    """The sides of a rotated box are other distances than those of an upright one, though both have bins."""
    upright = make(seed=1, bins=True)
    rotated = make(seed=2, bins=True).replace(ltrb=None)
    for ours, theirs in ((upright, rotated), (rotated, upright)):
        assert align(ours, theirs)[1].dist is None
        with pytest.raises(DistillError, match='those of the student are not'):
            align(ours, theirs)[1].require('dist')
    assert torch.equal(align(rotated, rotated)[1].dist, rotated.dist)
