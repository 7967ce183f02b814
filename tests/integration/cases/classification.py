"""The promises that classifiers keep, with and without a distillation token, and in which cases."""

from typing import Any

from tests.integration.cls_lab import AUGMENTED, DETERMINISTIC, FEATURES, LOGITS, NORMED, PROJECTED, TOKEN
from tests.integration.promises import Case, weighted

# The teacher of a ResNet is a DeiT, and the other way round: what draws numbers, and what keeps statistics.
_DEIT, _RESNET = dict(family='deit', extra=AUGMENTED), dict(family='resnet', extra=AUGMENTED)
# Two iterations per epoch.
SHORT = dict(train_dataloader__batch_size=8, train_cfg__max_epochs=2)
_VALIDATED = dict(
    SHORT,
    extra=AUGMENTED,
    val=True,
    train_cfg__val_interval=1,
    default_hooks__checkpoint__published_keys=['state_dict'],
)
_LEARNED = dict(features=NORMED, ofa=PROJECTED)
# What a student learns in either form, without and with a distillation token.
HOOK = Case('resnet', dict(logits=LOGITS))
MODEL = Case('resnet', _LEARNED, 'model_form', trained=('features', 'ofa'), normed=1)
TOKEN_HOOK = Case('deit', dict(token=TOKEN))
TOKEN_MODEL = MODEL.but(family='deit', terms=dict(token=TOKEN, **_LEARNED))
_FOUR = {'hook': HOOK, 'model': MODEL, 'token, hook': TOKEN_HOOK, 'token, model': TOKEN_MODEL}
CASES = {
    name: case.but(options=_VALIDATED, teacher=_DEIT if case.family == 'resnet' else _RESNET, noise=('DropPath',))
    for name, case in _FOUR.items()
}
_WINDOW = dict(options=dict(SHORT, train_cfg__max_epochs=3, extra=AUGMENTED), distill=dict(start=1, stop=2))
_EXACT = dict(SHORT, extra=DETERMINISTIC, train_cfg__max_epochs=4, default_hooks__checkpoint__interval=1)
_RAMP = dict(type='auto', target=0.5, batches=5, schedule=dict(type='linear', start=0.5, end=2.0))
# Temperatures that are found in the run.
_FOUND = {kind: dict(LOGITS, temperature=dict(type=kind)) for kind in ('gap', 'learned')}
# An alpha has nothing to balance where the terms have no weight.
_HALF = dict(distill=dict(alpha=0.5))
_CONVNEXT = HOOK.but(family='convnext', options=dict(extra=AUGMENTED), noise=('DropPath',))
_WORKER = CASES['token, hook'].but(options=dict(train_dataloader__num_workers=1))
# The teacher knows two of the four classes, so that for some batches there is nothing to teach, on one rank alone as
# well.
_TWO_RANKS = {
    'token, model': TOKEN_MODEL.but(
        options=dict(train_dataloader__batch_size=2, train_cfg__max_epochs=3),
        teacher=dict(classes=5, names=('square', 'star', 'moon', 'bar', 'sun')),
        distill=dict(start=1, stop=2, stages=[dict(until=2, freeze=['net.patch_embed']), {}]),
        frozen='net.patch_embed.',
        on='000011110000',
        idle=True,
    )
}
_HALVES = dict(extra=DETERMINISTIC, train_dataloader__batch_size=4)


def _recomputed(family: str, block: str, inside: str, **more: dict) -> Case:
    # At the recomputed module itself, with random depth in it.
    terms = dict(features={**FEATURES, 'student': block}, ofa=PROJECTED, logits=LOGITS, **more)
    return MODEL.but(
        family=family, terms=terms, options=dict(extra='model.update(drop_path_rate=0.2)\n'), inside=f'{block}.{inside}'
    )


def _rules(family: str) -> dict[str, Any]:
    # A tenfold rate for classifiers, no decay for norms and biases.
    head = 'net.fc' if family == 'resnet' else 'net.head'
    rules = dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={head: dict(lr_mult=10.0)})
    return dict(steps=1, optim_wrapper__paramwise_cfg=rules, param_scheduler=[])


_RECOMPUTED = (
    _recomputed('deit', 'net.blocks.2', 'norm1', token=TOKEN),
    _recomputed('convnext', 'net.stages.2', 'blocks.0.norm'),
)
_INNER = dict(loss=dict(type='AttentionTransferLoss'), student='net.layer1.0.conv1', teacher='net.layer1')
_TWO = {'hook': HOOK, 'token, model': TOKEN_MODEL}
# `vit_attention` names the last of twelve blocks.
_VIT = dict(family='vit', extra="model['depth'] = 12\n")
_RECIPES = (
    ('kl', 'resnet', {}, ()),
    ('dkd', 'resnet', {}, ()),
    ('dist', 'resnet', {}, ()),
    ('deit_soft', 'deit', {}, ()),
    ('deit_hard', 'deit', {}, ()),
    ('deit_token', 'deit', {}, ()),
    ('deit_token_soft', 'deit', {}, ()),
    ('vit_feature', 'resnet', _VIT, ('features',)),
    ('vit_attention', 'resnet', _VIT, ()),
    ('ofa', 'resnet', {}, ('ofa',)),
    ('born_again', 'resnet', {}, ()),
    ('long_tail', 'resnet', {}, ()),
    ('patient', 'resnet', {}, ()),
    ('multi_teacher', 'resnet', {}, ()),
)
#: ``{promise: {name: case}}``; the tests are in test_promises.py, test_options.py and test_scripts.py.
KEEPS = {
    'weight_zero': {
        'hook': _CONVNEXT.silent().but(**_HALF),
        'hook, alpha 0': _CONVNEXT.but(distill=dict(alpha=0.0)),
        'model, clipped gradients': CASES['model']
        .silent()
        .but(options=dict(optim_wrapper__clip_grad=dict(max_norm=0.5))),
        'token, hook, a worker': _WORKER.silent().but(**_HALF),
        'token, hook, a worker, alpha 0': _WORKER.but(distill=dict(alpha=0.0)),
        'token, model': CASES['token, model'].silent().but(**_HALF),
    },
    # Where a token is taught, the labels teach the class head alone.
    'first_losses': {name: CASES[name] for name in ('hook', 'model')},
    'start_stop': {name: case.but(**_WINDOW) for name, case in _FOUR.items()},
    'stages': {
        'hook': HOOK.but(
            options=dict(SHORT, train_cfg__max_epochs=2),
            distill=dict(stages=[dict(until=1, terms=['logits'], freeze=['backbone'], alpha=0.5), {}]),
            frozen='layer1',
            on='0011',
        )
    },
    'ramp': {
        'hook': TOKEN_HOOK.but(
            terms=dict(token=TOKEN, logits=LOGITS),
            options=dict(SHORT, optim_wrapper__optimizer__lr=0.0),
            distill=dict(alpha=0.5),
        )
    },
    'pair': CASES,
    'averages': CASES,
    'trained': {name: case for name, case in CASES.items() if case.trained},
    'restless': {
        'a ResNet': CASES['token, model'].but(noise=('BatchNorm2d', 'DropPath')),
        'a DeiT': CASES['model'].but(noise=('DropPath',)),
    },
    'published': CASES,
    'load_from': CASES,
    'plain_resume': {'plain': TOKEN_HOOK.but(options=_EXACT)},
    'sigkill': {
        'token, model': TOKEN_MODEL.but(
            terms=weighted(dict(TOKEN_MODEL.terms, **_FOUND), _RAMP),
            options=_EXACT,
            # It dies and goes on in a stage, and comes to the next one.
            distill=dict(start=1, stop=3, stages=[dict(until=3, freeze=['net.patch_embed', 'net.norm']), {}]),
            on='00111100',
        )
    },
    'silent_resume': {
        name: case.but(options=dict(SHORT, extra=AUGMENTED, default_hooks__checkpoint__interval=1)).silent()
        for name, case in {'token, hook': TOKEN_HOOK, 'token, model': TOKEN_MODEL}.items()
    },
    'two_processes': _TWO_RANKS,
    'idle_ranks': _TWO_RANKS,
    'other_classes': {
        name: case.but(
            options=dict(train_dataloader__batch_size=16),
            teacher=dict(classes=5, names=('square', 'bar', 'star', 'circle', 'moon')),
        )
        for name, case in _TWO.items()
    },
    # test_options.py
    'bf16': _TWO,
    'accumulation': {
        'token, hook': TOKEN_HOOK.but(terms=dict(token=TOKEN, logits=LOGITS), options=_HALVES),
        'token, model': TOKEN_MODEL.but(
            terms=dict(token=TOKEN, logits=LOGITS, features=FEATURES, ofa=PROJECTED), options=_HALVES
        ),
    },
    'checkpointing': {
        f'{case.family}, {how}': case.but(recompute=recompute)
        for case in _RECOMPUTED
        for how, recompute in {
            'activation_checkpointing': dict(activation_checkpointing=[case.terms['features']['student']]),
            'set_grad_checkpointing': {},
        }.items()
    },
    'no_gradient': {
        how: HOOK.but(terms=dict(at=_INNER), options=dict(train_cfg__max_epochs=2, **option), distill=dict(start=1))
        for how, option in dict(
            freeze=dict(model__freeze=['conv1', 'bn1', 'layer1']),
            activation_checkpointing=dict(activation_checkpointing=['net.layer1']),
        ).items()
    },
    'paramwise': {name: case.but(options=_rules(case.family)) for name, case in _TWO.items()},
    'compiled': {
        'token, model': TOKEN_MODEL.but(
            options=dict(SHORT, model__depth=2, extra=DETERMINISTIC, train_cfg__max_epochs=3),
            distill=dict(start=1, stop=2),
            on='001100',
        )
    },
    # test_scripts.py
    'scripts': {name: CASES[name] for name in ('hook', 'token, model')},
    'recipes': {
        recipe: Case(family, {}, options=dict(val=True), teacher=teacher, trained=trained, distill=dict(recipe=recipe))
        for recipe, family, teacher, trained in _RECIPES
    },
}
