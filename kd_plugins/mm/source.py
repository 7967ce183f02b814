"""A model of the MM family as a teacher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import kd_plugins.mm.heads  # noqa: F401  (registers the head readers)
from kd_plugins.config_files import resolve_config
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.errors import DistillError, check_keys
from kd_plugins.mm.configs import load_config
from kd_plugins.mm.teacher import TEACHER_KEYS, build_teacher
from kd_plugins.teachers import PixelFormat, find_file


def find(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Check that config and checkpoint are there; files get absolute paths.

    Raises:
        DistillError: They are not, or a key is misspelt.
    """
    check_keys(cfg, TEACHER_KEYS, 'teacher')
    if not cfg.get('checkpoint'):
        raise DistillError("teacher needs 'checkpoint': a teacher with random weights would teach noise.")
    found = dict(cfg)
    if isinstance(cfg['config'], (str, os.PathLike)):
        path = resolve_config(os.fspath(cfg['config']))
        found['config'] = cfg['config'] if '::' in str(cfg['config']) else os.path.abspath(path)
    else:
        load_config(cfg['config'])
    found['checkpoint'] = find_file(cfg['checkpoint'])
    return found


def build(cfg: Mapping[str, Any], student: PixelFormat) -> tuple[Teacher, list[str]]:
    """Load a model of the MM family.

    Raises:
        DistillError: It cannot be loaded.
    """
    return build_teacher(cfg, student)
