"""The canonical form: shapes, decoding, selections, and the three activations."""

from __future__ import annotations

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.predictions import DensePredictions

SIZES, STRIDES, A = ((2, 3), (1, 2)), (8.0, 16.0), 8


def make(activation='sigmoid', channels=4, **fields):
    torch.manual_seed(0)
    cls = torch.randn(2, A, channels, dtype=torch.float64, requires_grad=True)
    cls = cls.sigmoid() if activation == 'probability' else cls
    fields = {'ltrb': torch.rand(2, A, 4), 'obj': torch.randn(2, A, 1), 'points': torch.rand(A, 2) * 20, **fields}
    return DensePredictions(cls=cls, activation=activation, level_sizes=SIZES, strides=STRIDES, **fields)


def test_boxes_use_each_levels_stride():
    p = make(points=torch.full((A, 2), 100.0), ltrb=torch.tensor([1.0, 2, 3, 4]).expand(1, A, 4).repeat(2, 1, 1))
    assert p.stride_of[:, 0].tolist() == [8.0] * 6 + [16.0] * 2
    assert p.boxes()[0, 0].tolist() == [92, 84, 124, 132]
    assert p.boxes()[1, 7].tolist() == [84, 68, 148, 164]


def test_select_levels():
    p = make()
    q = p.select_levels([16.0, 32.0])
    assert q.strides == (16.0,) and q.level_sizes == ((1, 2),)
    assert torch.equal(q.cls, p.cls[:, 6:]) and torch.equal(q.boxes(), p.boxes()[:, 6:])
    assert p.select_levels([8.0, 16.0]) is p
    with pytest.raises(DistillError, match='no level of stride'):
        p.select_levels([4.0])


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax', 'probability'])
def test_binary_logits_give_the_class_probabilities(activation):
    p = make(activation)
    torch.testing.assert_close(p.binary_logits().sigmoid(), p.class_probabilities())
    assert p.class_probabilities().shape[-1] == p.num_classes == (3 if activation == 'softmax' else 4)


@pytest.mark.parametrize('activation', ['softmax', 'probability'])
def test_binary_logits_stay_finite(activation):
    extreme = torch.tensor([[200.0, 0, -200]]) if activation == 'softmax' else torch.tensor([[1.0, 0, 0.5]])
    cls = extreme.expand(1, A, 3).clone().requires_grad_()
    p = DensePredictions(cls=cls, activation=activation, level_sizes=SIZES, strides=STRIDES, points=torch.zeros(A, 2))
    p.binary_logits().sum().backward()
    assert p.binary_logits().isfinite().all() and cls.grad.isfinite().all()


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax', 'probability'])
def test_selected_classes_keep_their_probability(activation):
    p = make(activation)
    torch.testing.assert_close(p.select_classes([2, 0]).class_probabilities(), p.class_probabilities()[..., [2, 0]])
    assert p.select_classes(range(p.num_classes)) is p


@pytest.mark.parametrize('index', [[4], [-1], [0, 0]])
def test_wrong_class_indices(index):
    with pytest.raises(DistillError, match='Class ind'):
        make().select_classes(index)


def test_confidence_includes_objectness():
    p = make()
    torch.testing.assert_close(p.confidence(), p.cls.sigmoid().amax(-1) * p.obj.sigmoid()[..., 0])
    torch.testing.assert_close(p.replace(obj=None).confidence(), p.cls.sigmoid().amax(-1))


def test_require_says_why():
    p = make(ltrb=None, absent={'ltrb': 'it was dropped'})
    with pytest.raises(DistillError, match="no 'ltrb': it was dropped"):
        p.boxes()
    with pytest.raises(DistillError, match="no 'dist': the head has no such output"):
        p.require('dist')


def test_detach_and_float():
    p = make()
    assert p.cls.requires_grad and not p.detach().cls.requires_grad
    assert p.map(torch.Tensor.bfloat16).float().obj.dtype == torch.float32
    assert p.float().cls.dtype == torch.float64


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'activation': 'tanh'}, 'activation'),
        ({'strides': (16.0, 8.0)}, 'ascend'),
        ({'strides': (8.0,)}, 'level sizes'),
        ({'num_priors': 2}, 'positions'),
        ({'points': torch.zeros(A, 3)}, 'points'),
        ({'obj': torch.zeros(2, A)}, 'obj'),
        ({'dist': torch.zeros(2, A, 3, 5)}, r'dist must be \(2, 8, 4, R\)'),
        ({'box': torch.zeros(2, A, 4)}, 'box_coding'),
        ({'cls': torch.zeros(2, A)}, 'cls'),
    ],
)
def test_shapes_that_do_not_fit(fields, message):
    with pytest.raises(DistillError, match=message):
        make().replace(**fields)
