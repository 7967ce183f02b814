"""The mean teacher in real runs of both zoos: one file of teachers, and no host knows of it."""

import copy
import os

import pytest
import torch

from tests.integration.lab import LOGITS, Probe, distill_hook, weights
from tests.integration.promises import difference

EMA = dict(ema=0.1)
#: Also a feature, with an adapter to train beside the average.
TERMS = dict(
    logits=LOGITS,
    neck=dict(
        loss=dict(type='FeatureMSELoss'),
        student='neck',
        teacher='neck',
        adapter=[dict(type='ConvAdapter', in_channels=16, out_channels=16)],
    ),
)


def config_of(lab):
    config = lab.plain(train_cfg__max_epochs=2, default_hooks__checkpoint__interval=1)
    config.train_dataloader.dataset.pipeline[3].prob = 0.0
    return lab.hook_form(config, EMA, TERMS)


def floats(model):
    return {k: v.double().clone() for k, v in model.state_dict().items() if v.is_floating_point()}


@pytest.fixture(scope='module')
def whole(lab):
    """A run of 8 iterations, the student after each of them, and what was logged."""
    students, seen = [], {}

    def keep(runner):
        students.append(floats(runner.model))
        # Of the run, which forgets them at its end.
        seen['teacher'] = distill_hook(runner).session.teacher

    probe = Probe(keep)
    runner = lab.train(config_of(lab), probe)
    return runner, seen['teacher'], students, probe.logs


def test_mmengine_averages_the_student(lab, whole):
    runner, teacher, students, logs = whole
    assert teacher.updates == len(students) == 8
    # Within the first 1 / 0.1 steps it is the mean of all weights, those of the start included.
    start = floats(lab.build(runner.cfg))
    found = floats(teacher.model)
    for key, value in found.items():
        mean = (start[key] + sum(s[key] for s in students)) / 9
        torch.testing.assert_close(value, mean, atol=1e-5, rtol=1e-4)
    assert all(log['loss_kd_logits'] > 0 and log['loss_kd_neck'] > 0 for log in logs)


def test_mmengine_resumes_it(lab, whole):
    runner, teacher, _, _ = whole
    config = config_of(lab)

    def die(runner):
        if runner.iter + 1 == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.train(config, Probe(die))
    saved = torch.load(os.path.join(config.work_dir, 'epoch_1.pth'), map_location='cpu', weights_only=False)
    assert saved['state_dict'].keys() == runner.model.state_dict().keys()
    assert saved['kd_plugins']['teachers']['']['updates'] == 4
    config = copy.deepcopy(config)
    config.resume, config.experiment_name = True, config.experiment_name + '_resumed'
    seen = {}
    again = lab.train(config, Probe(lambda r: seen.update(teacher=distill_hook(r).session.teacher)))
    assert difference(weights(runner), weights(again)) == {}
    assert seen['teacher'].updates == 8 and seen['teacher'].fingerprint() == teacher.fingerprint()


def test_ultralytics(tmp_path):
    pytest.importorskip('ultralytics')
    from kd_plugins.yolo import DistillCallback
    from tests.integration.yolo_lab import new_model, results, train, write_data

    data = write_data(tmp_path / 'data')
    model, seen = new_model('yolo11n.yaml'), {}
    callback = DistillCallback(EMA).register(model)

    # Before the end of the run, which forgets them.
    model.add_callback('on_train_epoch_end', lambda t: seen.update(teacher=callback._runs[t].session.teacher))
    run = train(model, data, tmp_path, epochs=2, nbs=4)
    found = results(run)
    assert min(found['train/kdcls_loss'] + found['train/kdbox_loss']) > 0
    # Two batches of four, twice.
    assert seen['teacher'].updates == 4
    last = torch.load(run / 'weights' / 'last.pt', map_location='cpu', weights_only=False)
    assert 'kd_plugins' not in str(last.keys()) and type(last['model']).__name__ == 'DetectionModel'
