"""What the check before the first iteration is fed in real runs: pictures as the run will see them."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('ultralytics')

from kd_plugins.distiller import Session
from kd_plugins.errors import DistillError
from kd_plugins.yolo import DistillCallback
from tests.integration.yolo_lab import new_model, save_teacher, train, write_data, write_small


@pytest.fixture
def checked(monkeypatch):
    """The batches that sessions were checked on."""
    seen, plain = [], Session.check

    def check(self, inputs, samples=None):
        seen.append((inputs.clone(), samples))
        return plain(self, inputs, samples)

    monkeypatch.setattr(Session, 'check', check)
    return seen


def logged(folder, column):
    rows = [[cell.strip() for cell in line.split(',')] for line in open(folder / 'results.csv')]
    return float(rows[1][rows[0].index(f'train/{column}')])


def test_real_pictures_of_the_size_of_the_training(checked, tmp_path):
    data = write_data(tmp_path / 'data', images=4, size=80)
    student, teacher = write_small(tmp_path / 'student.yaml'), write_small(tmp_path / 'teacher.yaml', (24, 48, 64))
    model = new_model(student)
    DistillCallback(save_teacher(tmp_path / 'teacher.pt', teacher)).register(model)
    train(model, data, tmp_path, imgsz=96, rect=True, val=False)
    ((images, batch),) = checked
    assert images.shape == (1, 3, 96, 96) and 0 <= images.min() < images.max() <= 1
    # Coloured rectangles, not grey noise, and the labels that go with them.
    assert (images.amax(1) - images.amin(1)).amax() > 0.3
    assert len(batch['cls']) and [Path(f).name for f in batch['im_file']] == ['0.png']


def test_images_of_a_classifier(checked, tmp_path):
    data = write_data(tmp_path / 'data', images=6, task='classify')
    model = new_model('yolo11n-cls.yaml')
    DistillCallback(save_teacher(tmp_path / 'teacher.pt', 'yolo11n-cls.yaml')).register(model)
    train(model, data, tmp_path, imgsz=32, batch=3, val=False)
    ((images, batch),) = checked
    assert images.shape == (1, 3, 32, 32) and images.std() > 0.1
    assert batch['cls'].tolist() == [0]


RELATION = dict(student='neck', teacher='neck', loss=dict(type='RelationLoss'))


@pytest.mark.parametrize('term, batch, expected', [(None, 4, 1), (None, 1, 1), (RELATION, 4, 3)])
def test_as_many_images_as_the_losses_need(term, batch, expected, checked, tmp_path):
    data = write_data(tmp_path / 'data', images=4)
    small = write_small(tmp_path / 'small.yaml')
    model = new_model(small)
    options = dict(terms=dict(relation=term)) if term else {}
    DistillCallback(save_teacher(tmp_path / 'teacher.pt', small), **options).register(model)
    train(model, data, tmp_path, batch=batch, val=False)
    assert len(checked[0][0]) == expected


def test_batches_that_are_too_small_for_a_loss(tmp_path):
    data = write_data(tmp_path / 'data', images=4)
    small = write_small(tmp_path / 'small.yaml')
    model = new_model(small)
    DistillCallback(save_teacher(tmp_path / 'teacher.pt', small), terms=dict(relation=RELATION)).register(model)
    with pytest.raises(DistillError, match='batches of 2 are too few: it would be 0; make them 3 or more per process'):
        train(model, data, tmp_path, batch=2, val=False)


def grey(root):
    """The same pictures without colours."""
    data = Path(write_data(root))
    data.write_text(data.read_text() + 'channels: 1\n')
    return str(data)


def test_a_teacher_of_colours_teaches_a_grey_student(checked, tmp_path):
    """It is shown the grey level three times."""
    student, teacher = write_small(tmp_path / 'student.yaml'), write_small(tmp_path / 'teacher.yaml', (24, 48, 64))
    model = new_model(student)
    callback = DistillCallback(save_teacher(tmp_path / 'teacher.pt', teacher)).register(model)
    shown = []

    def spy(trainer):
        net = callback.session.teacher.model
        net.register_forward_pre_hook(lambda module, args: shown.append(args[0].detach().clone()))

    model.add_callback('on_train_start', spy)
    folder = train(model, grey(tmp_path / 'data'), tmp_path, val=False)
    assert checked[0][0].shape == (1, 1, 64, 64) and checked[0][1] is not None
    assert shown and all(x.shape[1] == 3 for x in shown)
    assert all(torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2]) for x in shown)
    assert logged(folder, 'kdcls_loss') > 0 and np.isfinite(logged(folder, 'kdcls_loss'))


def test_a_teacher_of_grey_images_cannot_see_colours(tmp_path):
    small = write_small(tmp_path / 'small.yaml')
    model = new_model(small)
    DistillCallback(save_teacher(tmp_path / 'teacher.pt', small, ch=1)).register(model)
    with pytest.raises(DistillError, match=r'images of 3 channel\(s\) and the teacher of 1'):
        train(model, write_data(tmp_path / 'data'), tmp_path)
