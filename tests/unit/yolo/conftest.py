"""Ultralytics with a throw-away configuration folder, and models by name, built once."""

import functools

import pytest

from tests.integration import yolo_lab

pytest.importorskip('ultralytics')


@pytest.fixture(scope='session')
def build():
    """``build(yaml, nc=3, seed=0)``: a model in evaluation mode; not to be changed by a test."""
    return functools.lru_cache(maxsize=None)(yolo_lab.build)


@pytest.fixture
def teacher_file(tmp_path):
    """``teacher_file(yaml, **options)``: the path of a saved, confident, untrained model."""

    def save(cfg, name='teacher.pt', **options):
        return yolo_lab.save_teacher(tmp_path / name, cfg, **options)

    return save
