"""The stand-in criterion: transparent, and absent from every copy and pickle."""

import copy
import io
import pickle

import pytest
import torch

from kd_plugins.yolo.criterion import KDCriterion, plain_criterion


@pytest.fixture
def student(build):
    from ultralytics.cfg import get_cfg

    model = copy.deepcopy(build('yolo26n.yaml')).train()
    model.args = get_cfg()
    model.criterion = model.init_criterion()
    return model


def add(loss, items, preds, batch):
    return torch.cat([loss, torch.ones(1)]), {**items, 'kdcls_loss': torch.ones(())}


def batch():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]])
    return {
        'img': torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        'batch_idx': torch.tensor([0.0, 1.0]),
        'cls': torch.tensor([[0.0], [1.0]]),
        'bboxes': boxes,
    }


def test_adds_to_what_the_plain_criterion_returns(student):
    preds = student(batch()['img'])
    plain_loss, plain_items = student.criterion(preds, batch())
    loss, items = KDCriterion(student.criterion, add)(preds, batch())
    assert torch.equal(loss[:-1], plain_loss) and loss[-1] == 1
    assert list(items) == [*plain_items, 'kdcls_loss']


def test_everything_else_goes_to_the_plain_criterion(student):
    plain = student.criterion
    proxy = KDCriterion(plain, add)
    assert isinstance(proxy, type(plain)) and proxy.o2m == plain.o2m == 0.8
    proxy.update()
    assert plain.updates == 1 and proxy.o2m == plain.o2m < 0.8
    proxy.updates = 5
    assert plain.updates == 5
    proxy.extra = 1
    del proxy.extra
    assert not hasattr(plain, 'extra') and not hasattr(proxy, 'extra')
    assert not hasattr(KDCriterion(plain.one2many, add), 'update')


def test_copies_are_plain(student):
    plain = student.criterion
    student.criterion = KDCriterion(plain, add)
    for found in (copy.deepcopy(student).criterion, copy.deepcopy(student.criterion), copy.copy(student.criterion)):
        assert type(found) is type(plain) and found is not plain
    assert 'criterion' not in str(student.state_dict().keys()) and not any(
        'criterion' in n for n, _ in student.named_modules()
    )


@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize('dumps', [pickle.dumps, pickle._dumps], ids=['c', 'python'])
def test_pickles_are_plain_and_name_nothing_of_ours(student, dumps, protocol):
    student.criterion = KDCriterion(student.criterion, add)
    data = dumps(student, protocol=protocol)
    assert b'kd_plugins' not in data and b'KDCriterion' not in data
    found = pickle.loads(data).criterion
    assert type(found).__name__ == 'E2ELoss' and found.o2m == 0.8


def test_torch_save_and_cloudpickle_are_plain(student):
    cloudpickle = pytest.importorskip('cloudpickle')
    student.criterion = KDCriterion(student.criterion, add)
    for module in (pickle, cloudpickle):
        buffer = io.BytesIO()
        torch.save(student, buffer, pickle_module=module)
        assert b'kd_plugins' not in buffer.getvalue()
        buffer.seek(0)
        assert type(torch.load(buffer, weights_only=False).criterion).__name__ == 'E2ELoss'


def test_plain_criterion(student):
    plain = student.criterion
    assert plain_criterion(KDCriterion(plain, add)) is plain and plain_criterion(plain) is plain
    assert plain_criterion(None) is None
