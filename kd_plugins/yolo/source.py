"""An Ultralytics ``.pt`` file as the teacher of another framework's detector or classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_plugins.distiller.protocol import Teacher
from kd_plugins.errors import DistillError, check_keys, nearest
from kd_plugins.teachers import PixelFormat
from kd_plugins.teachers.network import image_size
from kd_plugins.yolo.heads import BRANCHES
from kd_plugins.yolo.teacher import find_teacher, load_teacher

KEYS = ('ultralytics', 'classes', 'branch', 'trusted', 'input_size')


def find(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options; the file gets an absolute path.

    Raises:
        DistillError: The file is missing or a key is misspelt.
    """
    check_keys(cfg, KEYS, 'teacher')
    branch, classes = cfg.get('branch', 'one2many'), cfg.get('classes')
    if branch not in BRANCHES:
        raise DistillError(f'teacher.branch has no choice {branch!r}: {nearest(branch, BRANCHES)}')
    if not isinstance(cfg.get('trusted', False), bool):
        raise DistillError(f'teacher.trusted must be True or False, got {cfg["trusted"]!r}.')
    if classes is not None and (isinstance(classes, str) or not isinstance(classes, Sequence)):
        raise DistillError(f'teacher.classes must be a list of names, got {classes!r}.')
    image_size(cfg.get('input_size'), 'teacher.input_size')
    return {**cfg, 'ultralytics': find_teacher(cfg['ultralytics'])}


def build(cfg: Mapping[str, Any], student: PixelFormat) -> tuple[Teacher, list[str]]:
    """Load a detector or classifier.

    With ``input_size``, pixels or ``(height, width)``, a classifier sees the batch resized, else as it is.

    Raises:
        DistillError: It cannot be loaded, is neither, or is a detector with ``input_size``.
    """
    teacher = load_teacher(
        cfg['ultralytics'],
        student,
        branch=cfg.get('branch', 'one2many'),
        trusted=cfg.get('trusted', False),
        size=image_size(cfg.get('input_size'), 'teacher.input_size'),
    )
    if cfg.get('classes') is not None:
        if len(cfg['classes']) != teacher.num_classes:
            raise DistillError(
                f'teacher.classes has {len(cfg["classes"])} names but the teacher predicts {teacher.num_classes} '
                'classes.'
            )
        teacher.classes = tuple(cfg['classes'])
    return teacher, []
