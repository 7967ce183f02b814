"""Teachers: where they come from (sources), and how they are loaded, given pixels and run. Needs torch only."""

from kd_plugins.teachers.base import ModelTeacher
from kd_plugins.teachers.checkpoints import Weights, check_prefix, find_file, find_weights, load_checkpoint
from kd_plugins.teachers.frozen import FrozenTeacher
from kd_plugins.teachers.loading import load_strictly, unfilled
from kd_plugins.teachers.names import match_names
from kd_plugins.teachers.network import ClassifierNetwork, DataConfig, create_network, data_config
from kd_plugins.teachers.pixels import ULTRALYTICS, Padding, PixelFormat, Renormalize, Resized
from kd_plugins.teachers.sources import build_source, find_source, register_teacher, teacher_kind

__all__ = [
    'ULTRALYTICS',
    'ClassifierNetwork',
    'DataConfig',
    'FrozenTeacher',
    'ModelTeacher',
    'Padding',
    'PixelFormat',
    'Renormalize',
    'Resized',
    'Weights',
    'build_source',
    'check_prefix',
    'create_network',
    'data_config',
    'find_file',
    'find_source',
    'find_weights',
    'load_checkpoint',
    'load_strictly',
    'match_names',
    'register_teacher',
    'teacher_kind',
    'unfilled',
]
