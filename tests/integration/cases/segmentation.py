"""The promises that segmentors keep, and in which cases."""

from tests.integration.promises import Case, weighted
from tests.integration.seg_lab import CWD, DETERMINISTIC, FEATURES, GROUP_NORM, LOGITS, MGD, NORMED

_HOOK = Case('fcn', dict(logits=LOGITS), noise=('Dropout2d',))
_MODEL = Case('fcn', dict(features=NORMED), 'model_form', trained=('features',), normed=1, noise=('Dropout2d',))
_VALIDATED = dict(val=True, train_cfg__val_interval=2)
CASES = {'hook': _HOOK.but(options=_VALIDATED), 'model': _MODEL.but(options=_VALIDATED)}
_WINDOW = dict(options=dict(steps=6), distill=dict(start=2, stop=4))
_RAMP = dict(type='auto', target=0.5, batches=5, schedule=dict(type='linear', start=0.5, end=2.0))
_RESUMED = dict(steps=6, extra=DETERMINISTIC, default_hooks__checkpoint__interval=2)
_STRANGERS = dict(classes=5, names=('sky', 'bar', 'tree', 'ground', 'circle'))
# At the recomputed module itself, and in one.
_LAYER = _MODEL.but(
    terms=dict(features={**FEATURES, 'student': 'backbone.layer3', 'teacher': 'backbone.layer3'}, logits=LOGITS),
    options=dict(extra=GROUP_NORM),
)
_INNER = dict(loss=dict(type='AttentionTransferLoss'), student='backbone.layer3.0.conv1', teacher='backbone.layer3')
_RULES = dict(
    steps=1,
    # mmseg's usual tenfold rate for heads.
    optim_wrapper__paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={'head': dict(lr_mult=10.0)}),
    param_scheduler=[],
)
_TWO_RANKS = {
    'model': _MODEL.but(
        terms=dict(features=NORMED, mgd=MGD, logits=LOGITS),
        trained=('features', 'mgd'),
        distill=dict(start=1, stop=3),
        on='0110',
    )
}
#: ``{promise: {name: case}}``; the tests are in test_promises.py, test_options.py and test_scripts.py.
KEEPS = {
    'weight_zero': {
        'hook': CASES['hook'].silent(),
        'hook, cascade': _HOOK.but(family='ocr', teacher=dict(family='ocr')).silent(),
        'model': CASES['model'].silent(),
        'model, clipped gradients': _MODEL.but(
            family='segformer',
            terms=dict(features=NORMED),
            teacher=dict(family='segformer'),
            options=dict(optim_wrapper__clip_grad=dict(max_norm=0.5)),
        ).silent(),
    },
    'first_losses': CASES,
    'start_stop': {'hook': _HOOK.but(**_WINDOW), 'model': _MODEL.but(**_WINDOW)},
    'stages': {
        'hook': _HOOK.but(
            options=dict(steps=4),
            distill=dict(stages=[dict(until=2, terms=[*_HOOK.terms], train=['head']), {}]),
            frozen='backbone',
            on='0011',
        )
    },
    'ramp': {'hook': _HOOK.but(options=dict(optim_wrapper__optimizer__lr=0.0))},
    'pair': CASES,
    'averages': CASES,
    'trained': {'model': CASES['model']},
    'plain_resume': {'plain': _HOOK.but(options=_RESUMED)},
    'sigkill': {
        'model': _MODEL.but(
            terms=weighted(dict(features=NORMED, logits=LOGITS), _RAMP),
            options=_RESUMED,
            distill=dict(start=1, stop=5),
            on='011110',
            long=True,
        )
    },
    'silent_resume': {
        name: case.but(options=dict(default_hooks__checkpoint__interval=2)).silent()
        for name, case in {'hook': _HOOK, 'model': _MODEL}.items()
    },
    'two_processes': _TWO_RANKS,
    'generator': _TWO_RANKS,
    'other_classes': {
        'model': _MODEL.but(terms=dict(features=FEATURES, logits=LOGITS, cwd=CWD), teacher=_STRANGERS),
    },
    'no_common_classes': {'model': _MODEL.but(terms=dict(features=FEATURES), teacher=dict(classes=7))},
    # test_options.py
    'bf16': {'hook': _HOOK, 'model': _MODEL},
    'accumulation': {
        'model': _MODEL.but(
            terms=dict(features=FEATURES, cwd=CWD),
            options=dict(extra=DETERMINISTIC + GROUP_NORM, train_dataloader__batch_size=2),
        )
    },
    'checkpointing': {
        'with_cp': _LAYER.but(recompute=dict(model__backbone__with_cp=True), inside='backbone.layer3.0.conv1'),
        'activation_checkpointing': _LAYER.but(
            recompute=dict(activation_checkpointing=['backbone.layer3']), inside='backbone.layer3.0'
        ),
    },
    'no_gradient': {
        how: _HOOK.but(terms=dict(at=_INNER), options={f'model__backbone__{how}': value}, distill=dict(start=3))
        for how, value in dict(with_cp=True, frozen_stages=4).items()
    },
    'paramwise': {name: case.but(options=_RULES) for name, case in {'hook': _HOOK, 'model': _MODEL}.items()},
    'compiled': {
        'model': _MODEL.but(terms=dict(features=NORMED, logits=LOGITS), options=dict(steps=2), on='11'),
    },
    # test_scripts.py
    'scripts': CASES,
    'augmented': CASES,
    'own_train': {'hook': _HOOK, 'model': _MODEL},
    'recipes': {
        recipe: Case('fcn', dict(logits={}), options=dict(val=True), distill=dict(recipe=recipe))
        for recipe in ('pixel_kl', 'cwd')
    },
}
