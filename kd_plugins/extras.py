"""What installs a framework that is missing, read from this package's own metadata, ranges included."""

from __future__ import annotations

import re
from importlib import metadata

DISTRIBUTION = 'kd-plugins'
#: Is compiled where it is installed, which needs a compiler and build tools: not one command.
COMPILED = 'onedl-mmcv'


def how_to_install(extra: str) -> str:
    """A clause on what installs an extra, for the end of a sentence.

    This package is on no registry, so its own name is nothing that pip could install; what an extra stands for is.

    Args:
        extra: One of this package's, e.g. ``'yolo'``, or several, ``'mm,timm'``.

    Returns:
        E.g. ``"pip install 'ultralytics>=8.4.140,<8.5'"``.
    """
    needs = [need for name in extra.split(',') for need in requirements(name)]
    if not needs or any(need.startswith(COMPILED) for need in needs):
        return f"in a clone of kd_plugins: make install, or pip install -e '.[{extra}]' (its wheel: FILE.whl[{extra}])"
    return 'pip install ' + ' '.join(repr(need) for need in needs)


def requirements(extra: str) -> list[str]:
    """What an extra stands for, without the conditions under which; nothing where this package is not installed.

    Args:
        extra: One.
    """
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    found = [line.partition(';') for line in lines]
    return [need.strip() for need, _, when in found if re.search(rf'extra == ["\']{re.escape(extra)}["\']', when)]
