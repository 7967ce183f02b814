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
except ImportError as error:
    raise ImportError(
        "kd_plugins.mm needs MMEngine, which is not installed: pip install 'kd-plugins[mm]', or the mmengine / mmdet "
        'distribution you already use.'
    ) from error

_LOCATIONS = ['kd_plugins.mm']

DATASETS = Registry('dataset', parent=_DATASETS, scope='kd_plugins', locations=_LOCATIONS)
HOOKS = Registry('hook', parent=_HOOKS, scope='kd_plugins', locations=_LOCATIONS)
METRICS = Registry('metric', parent=_METRICS, scope='kd_plugins', locations=_LOCATIONS)
MODELS = Registry('model', parent=_MODELS, scope='kd_plugins', locations=_LOCATIONS)
