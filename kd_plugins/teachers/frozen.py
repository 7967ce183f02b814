"""The usual teacher: a loaded model that never changes."""

from __future__ import annotations

from kd_plugins.teachers.base import ModelTeacher


class FrozenTeacher(ModelTeacher):
    """A loaded model that stays as it is for the whole run; see `ModelTeacher`."""

    mode = 'frozen, evaluation mode'
