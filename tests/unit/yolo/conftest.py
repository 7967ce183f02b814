"""Ultralytics with a throw-away configuration folder, models by name, built once, and runs without a trainer."""

import copy
import functools
import time

import pytest
import torch

from kd_plugins.yolo import DistillCallback
from tests.integration import yolo_lab

pytest.importorskip('ultralytics')


#: Models of a few layers beside those of Ultralytics.
SMALL = {
    'small.yaml': dict(),
    'wide.yaml': dict(widths=(24, 48, 64)),
    'small26.yaml': dict(end_to_end=True),
    'wide26.yaml': dict(widths=(24, 48, 64), end_to_end=True),
    'small-p2.yaml': dict(levels='1, 2, 3, 4'),
    'small-p4.yaml': dict(levels='3, 4'),
}


@pytest.fixture(scope='session')
def build(tmp_path_factory):
    """``build(yaml, nc=3, seed=0)``: a model in evaluation mode; not to be changed by a test."""
    folder = tmp_path_factory.mktemp('small')

    @functools.cache
    def make(cfg, **options):
        return yolo_lab.build(file_of(cfg, folder), **options)

    return make


def file_of(cfg, folder):
    """The file of a small model; the names of others are known to Ultralytics."""
    return yolo_lab.write_small(folder / cfg, **SMALL[cfg]) if cfg in SMALL else cfg


@pytest.fixture(scope='session')
def teacher_file(tmp_path_factory):
    """``teacher_file(yaml, **options)``: the path of a saved, confident, untrained model; not to be changed by a
    test."""
    folder, made = tmp_path_factory.mktemp('teachers'), []

    @functools.cache
    def save(cfg, name='teacher.pt', **options):
        made.append(cfg)
        place = folder / str(len(made))
        place.mkdir()
        return yolo_lab.save_teacher(place / name, file_of(cfg, place), **options)

    return save


class Trainer:
    """What the callback asks of Ultralytics' trainer, without data or a loop."""

    def __init__(self, model, folder, epochs=4, **options):
        from ultralytics.cfg import get_cfg

        self.model, self.epochs, self.epoch, self.start_epoch, self.resume = model, epochs, 0, 0, False
        self.args = get_cfg(overrides={**dict(epochs=epochs, model='student.yaml', imgsz=64), **options})
        model.args = self.args
        self.data = {'names': dict(enumerate(yolo_lab.COLOURS))}
        self.train_loader, self.stride = [None, None], 32
        self.save_dir, self.wdir = folder, folder / 'weights'
        self.wdir.mkdir(exist_ok=True)
        self.csv, self.best, self.last = folder / 'results.csv', self.wdir / 'best.pt', self.wdir / 'last.pt'
        self.metrics, self.best_fitness, self.train_time_start = {}, None, time.time()
        self.scaler = torch.amp.GradScaler(enabled=False)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


@pytest.fixture
def trainer(build, tmp_path):
    """``trainer(student, **options)``: a `Trainer` of a fresh student in training mode."""

    def make(student='small.yaml', **options):
        return Trainer(copy.deepcopy(build(student)).train(), tmp_path, **options)

    return make


@pytest.fixture
def begin(trainer, teacher_file):
    """``begin(student, teacher, **options)``: the `Run` of a callback that has been told that a training begins.

    Its ``trainer`` and ``callback`` are attributes of what is returned.
    """

    def make(student='small.yaml', teacher='wide.yaml', run=None, **options):
        callback = DistillCallback(teacher if '/' in teacher else teacher_file(teacher), **options)
        found = trainer(student, **(run or {})) if isinstance(student, str) else student
        callback.on_pretrain_routine_end(found)
        started = callback._runs[found]
        started.trainer, started.callback = found, callback
        return started

    return make
