"""The registry of readers: lookup by class, refusal of heads whose outputs mean something else, user readers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_plugins.errors import DistillError
from kd_plugins.predictions import DensePredictions, find_reader, read, readers, register_reader


class Base(nn.Module):
    def forward(self, x):
        return x


class ToyHead(Base):
    def forward(self, x):
        return x

    def loss_by_feat(self):
        return 0


class OtherLoss(ToyHead):
    def loss_by_feat(self):
        return 1


class OtherForward(ToyHead):
    def forward(self, x):
        return x + 1


class OtherDecode(OtherLoss):
    def _predict_by_feat_single(self):
        return None


class Mixin:
    def forward_single(self, x):
        return x


class Mixed(Mixin, ToyHead):
    pass


class Restored(OtherForward):
    pass


def read_toy(head, outputs, *, training):
    return DensePredictions(
        cls=outputs + float(training),
        activation='sigmoid',
        level_sizes=((1, 2),),
        strides=(8.0,),
        points=torch.zeros(2, 2),
    )


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(readers, '_readers', {})


@pytest.mark.parametrize('target', [ToyHead, 'ToyHead', f'{__name__}.ToyHead'])
def test_registered_by_class_or_name(target):
    assert register_reader(target)(read_toy) is read_toy
    assert find_reader(ToyHead()) is read_toy
    assert find_reader(OtherLoss()) is read_toy
    assert readers.supported_heads() == ('ToyHead',)


def test_package_in_name_is_respected():
    register_reader('elsewhere.ToyHead')(read_toy)
    with pytest.raises(DistillError, match='ToyHead'):
        find_reader(ToyHead())


@pytest.mark.parametrize(
    'head, method',
    [
        (OtherForward, 'OtherForward.forward'),
        (OtherDecode, 'OtherDecode._predict_by_feat_single'),
        (Mixed, 'Mixin.forward_single'),
        (Restored, 'OtherForward.forward'),
    ],
)
def test_override_between_head_and_reader_is_refused(head, method):
    register_reader('ToyHead')(read_toy)
    with pytest.raises(DistillError, match=method) as error:
        find_reader(head())
    message = str(error.value)
    assert head.__name__ in message and 'Supported heads: ToyHead.' in message and 'register_reader' in message


def test_users_reader_for_the_overriding_class_is_nearer():
    register_reader('ToyHead')(read_toy)

    @register_reader(OtherForward)
    def mine(head, outputs, *, training):
        return read_toy(head, outputs, training=training)

    assert find_reader(OtherForward()) is mine
    assert find_reader(Restored()) is mine
    assert find_reader(ToyHead()) is read_toy


def test_unknown_head_names_supported_ones():
    register_reader('ToyHead')(read_toy)
    with pytest.raises(DistillError, match=r'Predictions of Base cannot be read\. Supported heads: ToyHead\.'):
        find_reader(Base())


def test_read_passes_the_mode():
    register_reader('ToyHead')(read_toy)
    head, outputs = ToyHead(), torch.zeros(1, 2, 3)
    assert read(head.train(), outputs).cls.eq(1).all()
    assert read(head.eval(), outputs).cls.eq(0).all()
    assert read(head.eval(), outputs, training=True).cls.eq(1).all()


def test_reader_must_return_dense_predictions():
    register_reader('ToyHead')(lambda head, outputs, *, training: outputs)
    with pytest.raises(DistillError, match='ToyHead returned Tensor'):
        read(ToyHead(), torch.zeros(1))


@pytest.mark.parametrize('target', ['', None, ToyHead()])
def test_target_must_be_class_or_name(target):
    with pytest.raises(DistillError, match='head class or its name'):
        register_reader(target)
