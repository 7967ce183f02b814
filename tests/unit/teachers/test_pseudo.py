"""Pseudo-labels: which detections become labels, and where."""

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.predictions import DensePredictions
from kd_plugins.teachers.pseudo import PseudoLabels


def predictions(rows, obj=None, classes=3):
    """One level of 4 cells of 16 pixels; per image ``[(cell, class, score, (x1, y1, x2, y2)), ...]``."""
    points = torch.tensor([[8.0, 8.0], [24.0, 8.0], [8.0, 24.0], [24.0, 24.0]])
    cls = torch.full((len(rows), 4, classes), -10.0)
    ltrb = torch.full((len(rows), 4, 4), 0.2)
    for i, found in enumerate(rows):
        for cell, kind, score, box in found:
            cls[i, cell, kind] = torch.logit(torch.tensor(score))
            x, y = points[cell]
            ltrb[i, cell] = torch.tensor([x - box[0], y - box[1], box[2] - x, box[3] - y]) / 16
    return DensePredictions(cls, 'sigmoid', ((2, 2),), (16.0,), points, ltrb=ltrb, obj=obj)


def test_confident_detections_become_rows_by_falling_score():
    found = predictions(
        [[(0, 0, 0.6, (0, 0, 14, 14)), (3, 2, 0.9, (18, 18, 30, 30)), (1, 1, 0.3, (18, 2, 30, 14))], []]
    )
    first, second = PseudoLabels(score=0.4).detect(found, None, (32, 32))
    torch.testing.assert_close(first, torch.tensor([[18, 18, 30, 30, 0.9, 2], [0, 0, 14, 14, 0.6, 0]]).float())
    assert second.shape == (0, 6)


def test_classes_are_numbered_as_the_student_does_and_others_never_count():
    found = predictions([[(0, 0, 0.9, (0, 0, 14, 14)), (3, 2, 0.9, (18, 18, 30, 30))]])
    (rows,) = PseudoLabels().detect(found, ([5], [2]), (32, 32))
    assert rows[:, 5].tolist() == [5] and rows[0, :4].tolist() == pytest.approx([18, 18, 30, 30])


def test_objectness_scales_scores():
    obj = torch.logit(torch.tensor([0.5, 0.5, 0.5, 0.9])).view(1, 4, 1)
    (rows,) = PseudoLabels(score=0.5).detect(
        predictions([[(0, 0, 0.9, (0, 0, 14, 14)), (3, 2, 0.9, (18, 18, 30, 30))]], obj=obj), None, (32, 32)
    )
    assert rows[:, 4].tolist() == pytest.approx([0.81]) and rows[:, 5].tolist() == [2]


def test_duplicates_go_boxes_end_at_the_image_and_slivers_are_no_objects():
    same = [(0, 1, 0.8, (-9, 2, 20, 20)), (1, 1, 0.7, (0, 2, 20, 20)), (2, 0, 0.6, (0, 2, 20, 20))]
    (rows,) = PseudoLabels().detect(predictions([[*same, (3, 0, 0.9, (31.5, 0, 99, 30))]]), None, (32, 32))
    # The second is the first again; the third is of another class; the last is half a pixel wide inside the image.
    assert rows[:, 5].tolist() == [1, 0]
    assert rows[0, :4].tolist() == pytest.approx([0, 2, 20, 20])


def test_an_object_that_has_a_label_gets_none():
    found = torch.tensor([[0, 0, 10, 10, 0.9, 0], [20, 20, 30, 30, 0.8, 1]])
    labels = torch.tensor([[0.0, 0, 10, 8]])  # overlap 0.8
    assert PseudoLabels(iou=0.7).missing(found, labels)[:, 5].tolist() == [1]
    assert PseudoLabels(iou=0.9).missing(found, labels)[:, 5].tolist() == [0, 1]
    assert len(PseudoLabels().missing(found, labels[:0])) == 2
    assert PseudoLabels().missing(found[:0], labels).shape == (0, 6)


def test_read():
    assert PseudoLabels.read(None) is None and PseudoLabels.read(False) is None
    assert PseudoLabels.read(True) == PseudoLabels()
    assert PseudoLabels.read(0.3) == PseudoLabels(score=0.3)
    chosen = PseudoLabels.read(dict(score=0.3, nms=0.5))
    assert chosen == PseudoLabels(0.3, 0.7, 0.5) and PseudoLabels.read(chosen.to_dict()) == chosen


@pytest.mark.parametrize(
    'value, words',
    [(1, 'score must be a number between 0 and 1, got 1'), ({'scor': 0.3}, 'score'), ({'iou': '0.5'}, "got '0.5'")],
)
def test_what_cannot_be_read(value, words):
    with pytest.raises(DistillError, match=words):
        PseudoLabels.read(value)
