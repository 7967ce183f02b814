"""A user's files of tests/unit/extending inside Ultralytics' trainer, named by the option ``imports``."""

import pickle

import pytest

from kd_plugins.distiller import Session
from kd_plugins.errors import DistillError
from kd_plugins.yolo import DistillCallback
from tests.integration.yolo_lab import new_model, results, save_teacher, train, write_data, write_small

pytest.importorskip('ultralytics')

POSE = """
nc: 3
kpt_shape: [2, 3]
{options}
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [{width}, 3, 2]]
head:
  - [[2, 3], 1, {head}, [nc, kpt_shape]]
"""


@pytest.fixture
def weights(monkeypatch):
    """Of the terms, in every iteration that is distilled."""
    found, losses = [], Session.losses

    def watched(session, *given):
        found.append({name: session.weight(term) for name, term in session.terms.items()})
        return losses(session, *given)

    monkeypatch.setattr(Session, 'losses', watched)
    return found


def test_a_schedule_of_a_short_option_and_a_loss(tmp_path, own_files, weights):
    """The short options are checked when they are written: a user's schedule must be known by then."""
    callback = DistillCallback(
        save_teacher(tmp_path / 'teacher.pt', write_small(tmp_path / 'big.yaml', (24, 48, 64))),
        cls=dict(type='halving', start=2.0, times=2),
        terms=dict(mine=dict(loss=dict(type='LogCoshLoss'), student='neck', teacher='neck')),
        imports=[own_files['loss'], own_files['schedule']],
    )
    # As the processes on several GPUs receive it.
    callback = pickle.loads(pickle.dumps(callback))
    model = new_model(write_small(tmp_path / 'small.yaml'))
    callback.register(model)
    run = train(model, write_data(tmp_path / 'data', images=8), tmp_path)
    assert [w['cls'] for w in weights] == pytest.approx([2.0, 1.0])
    found = results(run)
    assert found['train/kdcls_loss'][0] > 0 and found['train/kdmin_loss'][0] > 0
    kept = (run / 'kd.yaml').read_text()
    assert 'halving' in kept and 'own_schedule' in kept


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(cls=dict(type='halvin', start=2.0, times=2)), r"cls has no schedule type 'halvin': .*'halving'"),
        (dict(cls=dict(type='halving', start=2.0)), r"cls \(halving schedule\) does not take .*'times'"),
        (dict(imports=['own_schedul']), r"imports: 'own_schedul' cannot be imported"),
    ],
)
def test_near_misses_of_options(tmp_path, own_files, options, words):
    with pytest.raises(DistillError, match=words):
        DistillCallback('teacher.pt', **{'imports': [own_files['schedule']], **options})
