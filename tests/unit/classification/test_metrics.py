"""Metrics: against hand-counted values, timm and scikit-learn."""

import sys

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from sklearn.metrics import average_precision_score, f1_score

from kd_plugins.classification.metrics import Accuracy, MultiLabelAP
from kd_plugins.classification.sample import ClassSample
from kd_plugins.errors import DistillError


def samples(scores, labels, **heads):
    found = []
    for i, (score, label) in enumerate(zip(scores, labels, strict=True)):
        sample = ClassSample(metainfo=dict(img_path=f'{i}.png'))
        sample.gt_label, sample.pred_score = torch.as_tensor(label), torch.as_tensor(score)
        for name, values in heads.items():
            setattr(sample, name, torch.as_tensor(values[i]))
        found.append(sample)
    return found


def evaluate(metric, data, batch=3):
    """As the Runner does it: batch by batch, then once."""
    evaluator = Evaluator(metric)
    for start in range(0, len(data), batch):
        evaluator.process(data[start : start + batch])
    return evaluator.evaluate(len(data))


def test_accuracy_by_hand():
    scores = [[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6], [0.5, 0.3, 0.2]]
    found = evaluate(Accuracy(topk=(1, 2)), samples(scores, [0, 0, 0, 2]))
    assert found == {'accuracy/top1': 25.0, 'accuracy/top2': 50.0}
    assert evaluate(Accuracy(topk=1), samples(scores, [0, 1, 2, 0])) == {'accuracy/top1': 100.0}


def test_accuracy_of_each_class():
    """Two of three images of class 0 and none of class 2 are right; nobody has class 1."""
    scores = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.3, 0.6], [0.5, 0.3, 0.2]]
    metric = Accuracy(topk=1, per_class=True)
    found = evaluate(metric, samples(scores, [0, 0, 0, 2]))
    expected = {'accuracy/top1': 50.0, 'accuracy/mean_class': 100 / 3, 'accuracy/class_0': 200 / 3}
    assert found == pytest.approx({**expected, 'accuracy/class_2': 0.0})
    metric.dataset_meta = dict(classes=('cat', 'dog', 'cow'))
    assert {'accuracy/class_cat', 'accuracy/class_cow'} < set(evaluate(metric, samples(scores, [0, 0, 0, 2])))
    with pytest.raises(DistillError, match='per_class must be True or False'):
        Accuracy(per_class='yes')


def test_accuracy_is_timms():
    from timm.utils import accuracy

    torch.manual_seed(0)
    scores, labels = torch.rand(97, 11), torch.randint(0, 11, (97,))
    expected = accuracy(scores, labels, topk=(1, 3, 5))
    found = evaluate(Accuracy(topk=(1, 3, 5)), samples(scores, labels), batch=8)
    assert list(found.values()) == pytest.approx([float(v) for v in expected], abs=1e-4)


def test_equal_scores_rank_as_in_topk():
    torch.manual_seed(0)
    scores, labels = torch.randint(0, 3, (60, 7)).float(), torch.randint(0, 7, (60,))
    expected = (scores.topk(2).indices == labels[:, None]).any(1).float().mean()
    found = evaluate(Accuracy(topk=2), samples(scores, labels), batch=60)
    assert found['accuracy/top2'] == pytest.approx(100 * float(expected))


def test_each_head_alone():
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    data = samples(
        [right, right, wrong, right],
        [0, 0, 0, 0],
        pred_score_class=[right, right, right, wrong],
        pred_score_distillation=[wrong, wrong, wrong, right],
    )
    assert evaluate(Accuracy(topk=(1, 2)), data) == {
        'accuracy/top1': 75.0,
        'accuracy/top2': 100.0,
        'accuracy/top1_class_head': 75.0,
        'accuracy/top1_distillation_head': 25.0,
    }


def test_accuracy_collects_little():
    """What ranks exchange is one small number per image and head."""
    metric = Accuracy()
    metric.process(None, [s.to_dict() for s in samples(torch.rand(4, 1000), [0, 1, 2, 3])])
    assert len(metric.results) == 4 and all(isinstance(v, int) for r in metric.results for v in r.values())


@pytest.mark.parametrize('topk', [0, (1, 0), (), 1.5, '1', (True,)])
def test_bad_topk(topk):
    with pytest.raises(DistillError, match='topk must be whole numbers >= 1'):
        Accuracy(topk=topk)


@pytest.mark.parametrize(
    'data,message',
    [
        (samples([[0.5, 0.3, 0.2]], [0]), r'top 5 of 3 classes means nothing; write topk=\(1,\)'),
        (samples(torch.rand(2, 10), [3, 10]), '1.png is of class 10, but the model predicts 10'),
        (samples(torch.rand(2, 10), [-1, 0]), '0.png is of class -1'),
        (samples([[1.0] * 6, [float('nan')] * 6], [0, 0]), '1.png: pred_score is NaN'),
        (samples(torch.rand(1, 6), torch.ones(1, 6)), 'kd_plugins.MultiLabelAP'),
        ([ClassSample(metainfo=dict(img_path='a.png'))], 'a.png has no gt_label'),
        ([ClassSample(metainfo=dict(img_path='a.png'), gt_label=torch.tensor(0))], 'a.png has no pred_score'),
    ],
)
def test_accuracy_refuses(data, message):
    with pytest.raises(DistillError, match=message):
        evaluate(Accuracy(), data)


def test_multi_label_by_hand():
    scores = np.array([[0.9, 0.4, 0.1], [0.8, 0.6, 0.2], [0.3, 0.7, 0.9]], np.float32)
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], np.float32)
    found = evaluate(MultiLabelAP(), samples(scores, labels), batch=2)
    # Class 0: ranked 1, 0, 1 -> (1/1 + 2/3) / 2; class 1: ranked 1, 1, 0 -> 1; class 2 has no image.
    assert found['multi_label/mAP'] == pytest.approx(100 * (5 / 6 + 1) / 2)
    # Precision (1/2, 2/2), recall (1/2, 2/2) of classes 0 and 1: 3/4 and 3/4.
    assert found['multi_label/CF1'] == pytest.approx(75.0)
    # Overall 3 hits of 5 predictions and 4 labels.
    assert found['multi_label/OF1'] == pytest.approx(100 * 2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4))


def test_multi_label_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores, labels = rng.random((80, 6), np.float32), (rng.random((80, 6)) < 0.4).astype(np.float32)
    found = evaluate(MultiLabelAP(), samples(scores, labels), batch=7)
    assert found['multi_label/mAP'] == pytest.approx(100 * average_precision_score(labels, scores, average='macro'))
    assert found['multi_label/OF1'] == pytest.approx(100 * f1_score(labels, scores >= 0.5, average='micro'))


def test_nothing_predicted_is_zero():
    found = evaluate(MultiLabelAP(), samples(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])))
    assert found['multi_label/CF1'] == found['multi_label/OF1'] == 0.0


@pytest.mark.parametrize(
    'data,message',
    [
        (samples(torch.rand(1, 3), [0]), 'kd_plugins.Accuracy'),
        (samples(torch.rand(1, 3), torch.ones(1, 4)), '0.png has labels of 4 classes, but the model predicts 3'),
        (samples(torch.rand(2, 3), torch.zeros(2, 3)), 'none of the 2 images has a label'),
        (samples([[0.1, float('nan')]], torch.ones(1, 2)), '0.png: pred_score is NaN'),
        ([ClassSample(metainfo=dict(img_path='a.png'))], 'a.png has no gt_label'),
    ],
)
def test_multi_label_refuses(data, message):
    with pytest.raises(DistillError, match=message):
        evaluate(MultiLabelAP(), data)


def test_multi_label_says_that_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.metrics', None)
    with pytest.raises(DistillError, match='pip install scikit-learn'):
        MultiLabelAP()
