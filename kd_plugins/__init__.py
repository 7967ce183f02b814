"""Knowledge distillation plugins for MMEngine (mmdet, mmseg) and Ultralytics.

This module imports no framework, not even torch: import the sub-package of the one you use.
"""

__version__ = '0.1.0'


def config(spec: str) -> str:
    """The file of a config that an installed package ships, this one included, for ``_base_`` in a config of your own.

    MMEngine's own list of packages for ``_base_ = 'package::...'`` does not have this one, and refuses ``'mmseg::...'``
    under the OneDL distributions. It evaluates the expression behind ``_base_`` by itself, before anything of the file
    is executed, and takes a file with ``import kd_plugins`` for a pure-Python config, which has no ``_base_``: the
    import stands in the expression::

        _base_ = __import__('kd_plugins').config('kd_plugins::det/digits_yolox_student.py')

    In a pure-Python config ``read_base`` finds modules only; inherit from ours in a config with ``_base_``.

    Args:
        spec: ``'package::path/of/config.py'``, e.g. ``'mmseg::pspnet/...'`` or ``'kd_plugins::yolo/early.yaml'``.

    Returns:
        An absolute path, from a checkout as well as from a wheel.

    Raises:
        DistillError: There is no such file; the nearest ones are named.
    """
    from kd_plugins.config_files import resolve_config

    return resolve_config(spec, '_base_')
