"""The MMEngine registry nodes of scope ``kd_plugins``.

It stands at the top of the package because MMEngine itself imports ``{scope}.registry`` when it meets
``type='kd_plugins.X'``; the rest of the package is usable without MMEngine.
"""

try:
    from mmengine.registry import DATASETS as _DATASETS
    from mmengine.registry import HOOKS as _HOOKS
    from mmengine.registry import METRICS as _METRICS
    from mmengine.registry import MODELS as _MODELS
    from mmengine.registry import Registry
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise
    from kd_plugins.extras import how_to_install

    # With its name, by which commands and teachers tell what is missing.
    raise ModuleNotFoundError(
        'kd_plugins.mm needs MMEngine, which is not installed; install the mmengine, mmcv and mmdet or mmseg that you '
        f"use elsewhere, or OneDL's: {how_to_install('mm')}.",
        name=error.name,
    ) from None

_LOCATIONS = ['kd_plugins.mm']

DATASETS = Registry('dataset', parent=_DATASETS, scope='kd_plugins', locations=_LOCATIONS)
HOOKS = Registry('hook', parent=_HOOKS, scope='kd_plugins', locations=_LOCATIONS)
METRICS = Registry('metric', parent=_METRICS, scope='kd_plugins', locations=_LOCATIONS)
MODELS = Registry('model', parent=_MODELS, scope='kd_plugins', locations=_LOCATIONS)
