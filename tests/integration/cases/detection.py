"""The promises that detectors keep, and in which cases."""

from tests.integration.lab import DETERMINISTIC, DROPOUT, EARLY, FEATURES, GROUP_NORM, LOGITS, NORMED, SCORES
from tests.integration.promises import Case, weighted

_HOOK = Case('yolox', dict(logits=LOGITS))
_MODEL = Case('yolox', dict(features=NORMED), 'model_form', trained=('features',), normed=3)
# The same in the hook's own spelling.
_TRAINED = _MODEL.but(form='hook_form')
# Two iterations per epoch.
_SHORT = dict(train_dataloader__batch_size=4, train_cfg__max_epochs=2)
# A validation after each, in which nothing is below the threshold.
_VALIDATED = dict(_SHORT, val=True, train_cfg__val_interval=1, model__test_cfg__score_thr=0.0)
_DROPOUT_TEACHER = dict(options=_VALIDATED, family='gfl', teacher=dict(family='gfl', extra=DROPOUT))
CASES = {
    'hook': _HOOK.but(options=_VALIDATED),
    'model': _MODEL.but(options=_VALIDATED),
    'hook, dropout': _HOOK.but(**_DROPOUT_TEACHER, long=True),
    'hook, adapters, dropout': _TRAINED.but(**_DROPOUT_TEACHER, terms=dict(features=EARLY), normed=0),
}
_RAMP = dict(type='auto', target=0.5, batches=5, schedule=dict(type='linear', start=0.5, end=2.0))
_KILLED = _TRAINED.but(
    terms=weighted(dict(features=NORMED, logits=LOGITS), _RAMP),
    options=dict(_SHORT, train_cfg__max_epochs=4, extra=DETERMINISTIC, default_hooks__checkpoint__interval=1),
    on='11111111',
)
# Same images and order for any number of processes; group norm, so that only the gradient counts.
_JOINT = dict(
    steps=6,
    extra=GROUP_NORM + DETERMINISTIC,
    model__data_preprocessor__pad_size_divisor=96,
    train_dataloader__batch_size=2,
    train_dataloader__sampler__shuffle=False,
    env_cfg__dist_cfg__backend='gloo',
    optim_wrapper__optimizer__lr=1e-4,  # rounding must not grow from step to step
)
_RAMPS = dict(weight=dict(type='linear', start=0.0, end=4.0), temperature=dict(type='linear', start=4.0, end=1.0))
_BOTH = dict(features=FEATURES, logits=LOGITS)
_TWO_RANKS = {'hook, adapters': _TRAINED.but(terms=_BOTH, options=_JOINT, distill=dict(start=2, stop=4), on='001100')}
# Only KD has weight, as YOLOX's own loss depends on the batch.
_NO_TASK = """
for part, loss in dict(
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True), loss_obj=dict(type='CrossEntropyLoss', use_sigmoid=True),
    loss_bbox=dict(type='IoULoss', mode='square', eps=1e-16)).items():
    model['bbox_head'][part] = dict(**loss, reduction='sum', loss_weight=0.0)
del part, loss
"""
_SILENT_TASK = dict(
    extra=GROUP_NORM + DETERMINISTIC + _NO_TASK,
    model__data_preprocessor__pad_size_divisor=96,
    train_dataloader__batch_size=2,
)
# BatchNorm's statistics would be updated twice.
_STAGE = _MODEL.but(
    terms=dict(features={**FEATURES, 'student': 'backbone.stage4', 'teacher': 'backbone.stage4'}),
    options=dict(extra=GROUP_NORM),
)
_RECOMPUTED = dict(activation_checkpointing=['backbone.stage4'])
_RULES = dict(
    steps=1,
    optim_wrapper__paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={'backbone': dict(lr_mult=0.1)}
    ),
    param_scheduler=[],
)
#: ``{promise: {name: case}}``; the tests are in test_promises.py, test_options.py and test_scripts.py.
KEEPS = {
    'weight_zero': {
        'hook': CASES['hook'].silent(),
        'hook, rtmdet': _HOOK.but(family='rtmdet', teacher=dict(family='rtmdet')).silent(),
        'hook, gfl': CASES['hook, dropout'].silent(),
        'hook, a student with dropout': _HOOK.but(
            family='gfl', teacher=dict(family='gfl'), options=dict(extra=DROPOUT), noise=('Dropout', 'DropPath')
        ).silent(),
        'model': CASES['model'].silent(),
        'model, clipped gradients': _MODEL.but(options=dict(optim_wrapper__clip_grad=dict(max_norm=0.5))).silent(),
    },
    'first_losses': CASES,
    'start_stop': {
        'hook': _HOOK.but(options=dict(steps=6), distill=dict(start=2, stop=4)),
        'model': _MODEL.but(options=dict(steps=6), distill=dict(start=2, stop=4)),
        'hook, epochs': _HOOK.but(options=dict(_SHORT, train_cfg__max_epochs=3), distill=dict(start=1, stop=2)),
    },
    'stages': {
        'hook, adapters': _TRAINED.but(
            terms=_BOTH,
            options=dict(steps=6),
            distill=dict(stages=[dict(until=0.5, terms=['features'], freeze=['head'], alpha=1.0), {}]),
            frozen='bbox_head',
            on='000111',
        )
    },
    'ramp': {'hook': _HOOK.but(terms=dict(scores=SCORES), options=dict(optim_wrapper__optimizer__lr=0.0))},
    'schedules': {'hook': _HOOK.but(terms=dict(scores={**SCORES, **_RAMPS}))},
    'pair': CASES,
    'averages': CASES,
    'trained': {name: case for name, case in CASES.items() if case.trained},
    'state_dicts': {'model': CASES['model']},
    'restless': {'hook, dropout': CASES['hook, dropout'].but(noise=('BatchNorm2d', 'Dropout', 'DropPath'))},
    'load_from': {'model': CASES['model']},
    'served': {'model': CASES['model']},
    'without_teacher': {'hook': CASES['hook'], 'model': CASES['model']},
    'copies': {'hook': _HOOK, 'model': _MODEL},
    'exception': {'hook': _HOOK.but(tapped=('bbox_head',)), 'model': _MODEL.but(tapped=('neck',))},
    'plain_resume': {'plain': _KILLED},
    'sigkill': {'hook, adapters': _KILLED},
    'resume_of_another': {'model': CASES['model']},
    'two_processes': _TWO_RANKS,
    'joint': _TWO_RANKS,
    # test_options.py
    'bf16': {'hook': _HOOK, 'model': _MODEL.but(terms=_BOTH, long=True)},
    'accumulation': {'model': _MODEL.but(terms=_BOTH, options=_SILENT_TASK)},
    'checkpointing': {
        'the module itself': _STAGE.but(recompute=_RECOMPUTED, inside='backbone.stage4.0'),
        'after it': _MODEL.but(options=_STAGE.options, recompute=_RECOMPUTED, inside='backbone.stage4.0'),
    },
    'checkpointed_trunk': {
        'model': _MODEL.but(options=_STAGE.options, recompute=dict(activation_checkpointing=['backbone']))
    },
    'no_gradient': {
        'inside a recomputed module': _STAGE.but(
            terms=dict(features={**FEATURES, 'student': 'backbone.stage4.2', 'teacher': 'backbone.stage4.2'}),
            options=_RECOMPUTED,
        )
    },
    'average': {'model': _MODEL.but(terms=_BOTH)},
    'paramwise': {name: case.but(options=_RULES) for name, case in {'hook': _HOOK, 'model': _MODEL}.items()},
    'compiled': {
        'hook': _HOOK.but(
            family='gfl', teacher=dict(family='gfl'), options=dict(train_dataloader__batch_size=4), on='11'
        ),
        'model': _MODEL.but(
            family='gfl',
            terms=dict(features={**FEATURES, 'student': 'backbone[3]', 'teacher': 'backbone[3]'}),
            teacher=dict(family='gfl'),
            options=dict(train_dataloader__batch_size=8),
            on='1',
        ),
    },
    # test_scripts.py
    'scripts': {'hook': CASES['hook'], 'model': CASES['model']},
    'augmented': {'model': CASES['model']},
}
