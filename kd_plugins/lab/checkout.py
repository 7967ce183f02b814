"""The configs of the repository, which are no part of the package: the demo and the benchmark train with them."""

from __future__ import annotations

from pathlib import Path

import kd_plugins
from kd_plugins.errors import DistillError

CONFIGS = Path(kd_plugins.__file__).parents[1] / 'configs'


def our_config(name: str) -> Path:
    """The file of one of the project's own configs.

    Args:
        name: Below ``configs``, e.g. ``'det/digits_yolox_student.py'``.

    Raises:
        DistillError: There is none, because the package was installed without the repository.
    """
    path = CONFIGS / name
    if not path.is_file():
        raise DistillError(
            f'configs/{name} is missing: it is in the repository, not in the package; install from a clone of it with '
            'pip install -e .'
        )
    return path
