"""A user's files of tests/unit/extending inside Ultralytics' trainer, named by the option ``imports``."""

import importlib
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


@pytest.mark.parametrize('head', ['Pose', 'Pose26'])
def test_a_form_that_none_of_ours_covers(tmp_path, own_files, monkeypatch, caplog, head):
    """The keypoints of pose models, of either branch of an end-to-end one, beside our own term on the same head."""
    two = head == 'Pose26'
    for name, width in (('student', 16), ('teacher', 32)):
        options = 'end2end: True\nreg_max: 1' if two else ''
        (tmp_path / f'{name}-pose.yaml').write_text(POSE.format(width=width, head=head, options=options))
    tap = 'head.one2one' if two else 'head'
    callback = DistillCallback(
        save_teacher(tmp_path / 'teacher.pt', str(tmp_path / 'teacher-pose.yaml')),
        cls=1.0,
        terms=dict(points=dict(loss=dict(type='KeypointLoss'), student=tap, teacher=tap)),
        imports=[own_files['keypoints']],
    )
    loss, values = importlib.import_module(own_files['keypoints']).KeypointLoss, []
    forward = loss.forward

    def watched(self, student, teacher):
        value = forward(self, student, teacher)
        values.append((value.requires_grad, student.offsets.shape[1], value.item()))
        return value

    monkeypatch.setattr(loss, 'forward', watched)
    caplog.set_level('INFO', logger='ultralytics')
    model = new_model(str(tmp_path / 'student-pose.yaml'))
    callback.register(model)
    run = train(model, write_data(tmp_path / 'data', images=4, task='pose'), tmp_path)
    # The first is that of the check: without a gradient.
    assert [v[:2] for v in values] == [(False, 6), (True, 6)] and values[1][2] > 0
    (summary,) = (text for r in caplog.records if 'distillation is ON' in (text := r.getMessage()))
    assert 'KeypointLoss' in summary and 'not taught' not in summary
    found = results(run)
    assert found['train/kdpoi_loss'][0] > 0 and found['train/kdcls_loss'][0] > 0


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
