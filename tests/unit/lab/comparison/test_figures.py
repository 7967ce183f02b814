"""What the pictures call right, wrong and missed is what COCO does at IoU 0.5."""

import numpy as np
from PIL import Image

from kd_plugins.lab.comparison import figures
from kd_plugins.lab.comparison.figures import (
    Detections,
    Objects,
    choose_images,
    draw_curves,
    draw_detections,
    iou,
    judge,
    spread,
    task_loss,
)
from kd_plugins.lab.comparison.history import History


def objects(*boxes, labels, scores=None):
    scores = None if scores is None else np.array(scores)
    return Objects(np.array(boxes, float).reshape(-1, 4), np.array(labels, int), scores)


def test_iou():
    a, b = np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2], [5, 5, 6, 6], [0, 0, 2, 2]])
    assert np.allclose(iou(a, b), [[1 / 3, 0, 1]])


def test_judge():
    truth = objects([0, 0, 10, 10], [20, 20, 30, 30], labels=[1, 2])
    found = objects(
        [0, 0, 10, 9],  # right, but a better scored one took the object
        [0, 0, 10, 10],  # right
        [20, 20, 30, 30],  # wrong class
        [50, 50, 60, 60],  # nothing there
        labels=[1, 1, 1, 2],
        scores=[0.6, 0.9, 0.8, 0.7],
    )
    right, missed = judge(found, truth)
    assert right.tolist() == [False, True, False, False]
    assert missed.tolist() == [False, True]


def test_judge_of_nothing():
    right, missed = judge(objects(labels=[], scores=[]), objects([0, 0, 1, 1], labels=[0]))
    assert right.size == 0 and missed.tolist() == [True]
    right, missed = judge(objects([0, 0, 1, 1], labels=[0], scores=[0.5]), objects(labels=[]))
    assert right.tolist() == [False] and missed.size == 0


def test_images_are_spread_and_do_not_depend_on_detections():
    truth = {i: objects([0, 0, 1, 1], labels=[0]) for i in range(100)}
    assert choose_images(truth, 5) == [10, 30, 50, 70, 90]
    assert choose_images({3: objects(labels=[])}, 5) == [3]
    assert spread('abcdefghij', 2) == ['c', 'h'] and spread([1, 2], 20) == [1, 2] and spread([], 3) == []


def test_own_loss_is_without_distillation():
    history = History(train={10: dict(loss=5.0, loss_kd_logits=2.0, epoch=1), 20: dict(loss=4.0, epoch=2)})
    assert task_loss(history)[1] == [3.0, 4.0]


def test_axes_say_what_they_count(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(figures, 'save', lambda figure, path: saved.append(figure))
    history = History(train={1: dict(loss=1.0)}, val={2: dict(mIoU=0.2)})
    draw_curves(tmp_path / 'c.png', {'plain': [history]}, 0.4, 'mIoU', 'mIoU', 'iteration')
    left, right = saved[0].axes
    assert (left.get_xlabel(), right.get_xlabel(), right.get_ylabel()) == ('iteration', 'iteration', 'mIoU (%)')
    assert right.lines[0].get_xydata().tolist() == [[2, 20]]


def test_every_arm_is_drawn_and_looks_like_no_other(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(figures, 'save', lambda figure, path: saved.append(figure))
    history = History(train={1: dict(loss=1.0)}, val={2: dict(mIoU=0.2)})
    draw_curves(tmp_path / 'c.png', {f'arm {i}': [history] for i in range(15)}, 0.4, 'mIoU')
    for axes, more in zip(saved[0].axes, ([], ['teacher']), strict=True):
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == [*(f'arm {i}' for i in range(15)), *more]
        assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == len(labels)


def test_pictures_are_written_and_small(tmp_path):
    history = History(
        train={i: dict(loss=10 / i, epoch=1 + i // 50, time=0.1) for i in range(1, 100)},
        val={1: {'coco/bbox_mAP': 0.1}, 2: {'coco/bbox_mAP': 0.2}},
    )
    draw_curves(tmp_path / 'c.png', {'plain': [history], 'distilled': [history]}, 0.4, 'coco/bbox_mAP')
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / 'scene.png')
    found = {1: objects([5, 5, 50, 50], labels=[0], scores=[0.9])}
    truth = {1: objects([5, 5, 52, 50], [60, 0, 90, 20], labels=[0, 1])}
    files = {1: str(tmp_path / 'scene.png')}
    draw_detections(
        tmp_path / 'd.png', Detections([1], files, truth, {'teacher': found, 'plain': found}, ('cat', 'dog'))
    )
    for name in ('c.png', 'd.png'):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500
        assert (tmp_path / name).stat().st_size < 400_000
