"""The engine: taps, teacher, terms, schedules and the summary. Knows torch, losses, adapters and predictions only."""

from kd_plugins.distiller.bank import AdapterBank
from kd_plugins.distiller.checkpoints import find_weights, load_checkpoint
from kd_plugins.distiller.engine import CannotRunError, Distiller, Position
from kd_plugins.distiller.pixels import ULTRALYTICS, PixelFormat, Renormalize, Resized
from kd_plugins.distiller.sources import build_source, find_source, register_teacher, teacher_kind
from kd_plugins.distiller.summary import summary
from kd_plugins.distiller.taps import Capture, Tap, find_module, map_tensors
from kd_plugins.distiller.teacher import Teacher, load_strictly, untouched_rng
from kd_plugins.distiller.terms import Term, build_terms

__all__ = [
    'ULTRALYTICS',
    'AdapterBank',
    'CannotRunError',
    'Capture',
    'Distiller',
    'PixelFormat',
    'Position',
    'Renormalize',
    'Resized',
    'Tap',
    'Teacher',
    'Term',
    'build_source',
    'build_terms',
    'find_module',
    'find_source',
    'find_weights',
    'load_checkpoint',
    'load_strictly',
    'map_tensors',
    'register_teacher',
    'summary',
    'teacher_kind',
    'untouched_rng',
]
