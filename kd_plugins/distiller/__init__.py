"""The engine: taps, terms, schedules, adapters and the summary. Knows torch, losses, adapters and predictions only."""

from kd_plugins.distiller.apart import Apart
from kd_plugins.distiller.bank import AdapterBank
from kd_plugins.distiller.combining import Combination, Compared, register_combination
from kd_plugins.distiller.host import Host
from kd_plugins.distiller.optimizer import AdapterOptimizer
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.distiller.rng import untouched_rng
from kd_plugins.distiller.schedules import Position, Schedule, Window, build_window, register_schedule
from kd_plugins.distiller.session import CannotRunError, Session
from kd_plugins.distiller.summary import summary
from kd_plugins.distiller.taps import Capture, Tap, find_module, map_tensors
from kd_plugins.distiller.terms import Term, build_terms, images_of, resolver_of
from kd_plugins.distiller.weighting import Weighting, register_weighting

__all__ = [
    'AdapterBank',
    'AdapterOptimizer',
    'Apart',
    'CannotRunError',
    'Capture',
    'Combination',
    'Compared',
    'Host',
    'Position',
    'Schedule',
    'Session',
    'Tap',
    'Teacher',
    'Term',
    'Weighting',
    'Window',
    'build_terms',
    'build_window',
    'find_module',
    'images_of',
    'map_tensors',
    'register_combination',
    'register_schedule',
    'register_weighting',
    'resolver_of',
    'summary',
    'untouched_rng',
]
