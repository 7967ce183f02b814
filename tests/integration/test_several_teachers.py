"""Several teachers of one term, in real runs: of one zoo and of two, with the recipe that the package has for them."""

import copy

import pytest

from kd_plugins.errors import DistillError
from tests.integration.cls_lab import AUGMENTED
from tests.integration.lab import Probe, distill_hook, weights
from tests.integration.promises import difference

NAMES = ('red', 'green', 'blue')


# ---------------------------------------------------------------------- classifiers in MMEngine
def taught(lab, config, **options):
    config = copy.deepcopy(config)
    teachers = dict(resnet=lab.teacher(), deit=lab.teacher('deit'))
    config.default_hooks.distill = dict(type='kd_plugins.DistillHook', teachers=teachers, **options)
    return lab.named(config, f'_{len(str(options))}')


@pytest.mark.parametrize('combine', ['mean', 'confidence'])
def test_a_resnet_and_a_deit_teach_a_classifier(labs, combine):
    lab = labs('classification')
    calls = []

    def watch(runner):
        if not calls:
            for name, teacher in distill_hook(runner).session.teachers.items():
                teacher.model.register_forward_hook(lambda *_, name=name: calls.append(name))
        calls.append('step')

    config = taught(lab, lab.plain(), recipe='multi_teacher', terms=dict(logits=dict(combine=combine)))
    probe = Probe(watch)
    runner = lab.train(config, probe)
    summary = distill_hook(runner).summary
    assert 'resnet:logits + deit:logits' in ' '.join(summary.split()) and summary.count('  teacher  ') >= 2
    assert all(log['loss_kd_logits'] > 0 for log in probe.logs)
    assert calls == ['step', *['resnet', 'deit', 'step'] * 3]


def test_without_weight_it_is_the_plain_run(labs):
    """Bit for bit, with everything that draws random numbers."""
    lab = labs('classification')
    plain = lab.plain(extra=AUGMENTED)
    silent = taught(lab, plain, recipe='multi_teacher', terms=dict(logits=dict(weight=0.0, combine='confidence')))
    runs = [lab.train(config) for config in (plain, silent)]
    assert difference(*map(weights, runs)) == {}
    assert list(distill_hook(runs[1]).session.teachers) == ['resnet', 'deit']


# ---------------------------------------------------------------------- detectors, teachers of both zoos
@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    pytest.importorskip('ultralytics')
    pytest.importorskip('mmdet')
    from tests.integration import synthetic
    from tests.integration.test_yolo_teachers import confident
    from tests.integration.yolo_lab import save_teacher as save_yolo

    folder = tmp_path_factory.mktemp('teachers')
    return dict(
        mm=synthetic.save_teacher(synthetic.yolox(3), folder, NAMES, edit=confident),
        yolo=dict(ultralytics=save_yolo(folder / 'yolo.pt', 'yolov8n.yaml', NAMES)),
    )


def test_two_zoos_teach_a_detector_in_mmengine(teachers, tmp_path):
    from tests.integration import synthetic

    data = synthetic.write_coco(tmp_path / 'data', NAMES, images=4)
    config = synthetic.short_run(synthetic.yolox(3), tmp_path / 'run', synthetic.dataloader(data, NAMES))
    box = dict(loss=dict(type='BoxIoULoss'), student='head', teacher='*:head')
    config.default_hooks.distill = dict(
        type='kd_plugins.DistillHook', teachers=teachers, recipe='multi_teacher', terms=dict(box=box)
    )
    config.default_hooks.checkpoint = None
    watch, runner = synthetic.train(config)
    assert all(losses['loss_kd_cls'] > 0 and losses['loss_kd_box'] > 0 for losses in watch.losses)
    assert 'mm:head + yolo:head' in ' '.join(distill_hook(runner).summary.split())


def test_two_zoos_teach_a_detector_in_ultralytics(teachers, tmp_path):
    from kd_plugins.yolo import DistillCallback
    from tests.integration.yolo_lab import new_model, results, train, write_data

    model = new_model('yolo11n.yaml')
    callback = DistillCallback(teachers=teachers, recipe='multi_teacher').register(model)
    run = train(model, write_data(tmp_path / 'data', images=4), tmp_path, batch=2, val=False)
    assert min(results(run)['train/kdcls_loss']) > 0
    assert 'mm:head + yolo:head' in ' '.join(callback.summary.split())
    assert '*:head' in (run / 'kd.yaml').read_text()


def test_teachers_that_know_different_classes_have_no_mean(teachers, tmp_path):
    from kd_plugins.yolo import DistillCallback
    from tests.integration.yolo_lab import new_model, save_teacher, train, write_data

    other = save_teacher(tmp_path / 'other.pt', 'yolo11n.yaml', ('red', 'green', 'boat'))
    model = new_model('yolo11n.yaml')
    DistillCallback(teachers=dict(one=teachers['yolo'], other=other), recipe='multi_teacher').register(model)
    with pytest.raises(DistillError, match="know different ones of the student's; write one term for each teacher"):
        train(model, write_data(tmp_path / 'data', images=4), tmp_path, batch=2, val=False)
