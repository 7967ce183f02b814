"""Rows of what was logged."""

import torch

from kd_plugins.distiller.history import History


def add(history, *values, task=2.0):
    losses = {f'loss_kd_{name}': torch.tensor(v, requires_grad=True) for name, v in zip('ab', values, strict=True)}
    history.add(losses, torch.tensor(task), torch.tensor(float(sum(values))))


def test_a_row_is_the_mean_of_its_epoch():
    history = History()
    add(history, 1.0, 3.0)
    add(history, 3.0, 1.0)
    history.close('epoch', 1, dict(a=1.0, b=0.5))
    history.measured('mAP', 0.3)
    history.close('epoch', 2, dict(a=0.0, b=0.0))
    first = dict(epoch=1, loss_kd_a=2.0, loss_kd_b=2.0, weight_a=1.0, weight_b=0.5, kd_ratio=2.0, metric=0.3)
    off = dict(epoch=2, loss_kd_a=0.0, loss_kd_b=0.0, weight_a=0.0, weight_b=0.0, kd_ratio=0.0, metric=None)
    assert history.rows == [first, off] and list(history.rows[0]) == list(first)
    assert history.metric == 'mAP' and history.at('epoch') == 2


def test_an_epoch_that_is_done_again_has_one_row():
    history = History()
    kept = history.rows
    for value in (1.0, 5.0):
        add(history, value, 0.0)
        history.close('epoch', 1, dict(a=1.0, b=1.0))
    assert [row['loss_kd_a'] for row in history.rows] == [5.0] and history.rows is kept


def test_where_there_is_nothing_but_kd_there_is_no_ratio():
    history = History()
    add(history, 1.0, 0.0, task=0.0)
    history.close('iteration', 10, dict(a=1.0, b=0.0))
    assert history.rows[0]['kd_ratio'] is None
    history.close('iteration', 20, dict(a=1.0, b=0.0))
    assert history.at('iteration') == 20


def test_before_the_first_row_a_validation_is_left_out():
    history = History()
    history.measured('mAP', 0.3)
    assert not history.rows and history.metric is None and history.at('epoch') == 0
