"""Knowledge distillation plugins for MMEngine (mmdet, mmseg) and Ultralytics.

This module imports no framework, not even torch: import the sub-package of the one you use.
"""

__version__ = '0.1.0'


def config(spec: str) -> str:
    """The file of a config that an installed package ships, for ``_base_`` in a config of your own.

    ``_base_ = 'mmseg::...'`` makes MMEngine install another package under the OneDL distributions; this does not::

        _base_ = __import__('kd_plugins').config('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py')

    Args:
        spec: ``'package::path/of/config.py'``.

    Raises:
        DistillError: There is no such file; the nearest ones are named.
    """
    from kd_plugins.mm.configs import resolve_config

    return resolve_config(spec, '_base_')
