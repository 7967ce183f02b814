"""Importing a package of OpenMMLab whole, without what it says of its own optional packages."""

from __future__ import annotations

import contextlib
import io
import warnings
from importlib import import_module
from importlib.util import find_spec


def import_package(scope: str | None) -> None:
    """Import all that a package registers, as its first model or data set would; what it prints then goes nowhere.

    Packages say which optional ones they miss, of which nobody who starts a run asked. What cannot be imported is left
    to the run, which says why.

    Args:
        scope: ``default_scope`` of a config.
    """
    if not scope or scope == 'mmengine' or find_spec(scope) is None:
        return
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter('ignore')
        register = getattr(import_module(f'{scope}.utils'), 'register_all_modules', None)
        if register is not None:
            register(init_default_scope=False)
