"""The promises that Ultralytics' models keep, and in which cases."""

from tests.integration.promises import Case

NECK = dict(loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck')
# Its masks are drawn while it is on.
MASKED = {**NECK, 'loss': dict(type='MGDLoss')}
# Two iterations per epoch, a step of the optimizer and a validation after each.
_TWO, _THREE = dict(epochs=2, nbs=4), dict(epochs=3, nbs=4)
_DEFAULT = Case('yolo11n.yaml', dict(cls=1.0, box=1.0))
_TRAINED = _DEFAULT.but(terms=dict(neck=NECK), trained=('neck',), teacher=dict(family='small'))
CASES = {
    'yolo11n': _DEFAULT.but(options=_TWO),
    'yolo26n': _DEFAULT.but(family='yolo26n.yaml', options=_TWO, long=True),
    'yolo11n, adapters': _TRAINED.but(options=_TWO, long=True),
    'yolo26n, adapters': _TRAINED.but(family='yolo26n.yaml', options=_TWO),
}
#: ``{promise: {name: case}}``; the tests are in test_promises.py, test_options.py and test_scripts.py.
KEEPS = {
    'weight_zero': {
        name: (case.but(terms=dict(neck=MASKED)) if case.trained else case).silent() for name, case in CASES.items()
    },
    'first_losses': CASES,
    'start_stop': {'yolo11n': _DEFAULT.but(options=_THREE, distill=dict(start=1, stop=2))},
    'stages': {
        'yolo11n': _DEFAULT.but(
            terms=dict(cls=1.0, feature=1.0),
            teacher=dict(family='small'),
            options=_THREE,
            distill=dict(stages=[dict(until=1, terms=['feature'], freeze=['head'], alpha=1.0), {}]),
            frozen='model.23.',
            on='001111',
        )
    },
    'ramp': {'yolo11n': _DEFAULT.but(options=dict(epochs=2, lr0=0.0, val=False))},
    'pair': CASES,
    'trained': {name: case for name, case in CASES.items() if case.trained},
    'served': {'yolo11n': CASES['yolo11n']},
}
