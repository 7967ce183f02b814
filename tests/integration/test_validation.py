"""Promise 22: validation and test know nothing of distillation."""

import os
import runpy
import sys
from pathlib import Path

import mmdet
import pytest
import torch

from kd_plugins.mm import cli
from kd_plugins.teachers.frozen import FrozenTeacher
from tests.integration.lab import Config, Probe, distill_hook

MMDET_TOOLS = Path(mmdet.__file__).parent / '.mim' / 'tools'


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_the_teacher_does_not_run_in_validation(lab, form, monkeypatch):
    calls, taps, validated = [], [], []
    inner = FrozenTeacher.outputs

    def counted(self, *args):
        calls.append(args)
        return inner(self, *args)

    monkeypatch.setattr(FrozenTeacher, 'outputs', counted)

    class Watch(Probe):
        def before_val_epoch(self, runner):
            self.before = len(calls)

        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            validated.append(len(outputs))
            taps.extend(n for n, m in runner.model.named_modules() if 'forward' in m.__dict__)

        def after_val_epoch(self, runner, metrics=None):
            assert len(calls) == self.before
            assert distill_hook(runner)._capture is None

    config = getattr(lab, form)(lab.plain(val=True, train_cfg__max_epochs=2, train_cfg__val_interval=1), lab.teacher())
    lab.train(config, Watch())
    # One call per training iteration and one in the dry run.
    assert len(calls) == 8 + 1
    assert len(validated) == 8 and not taps


@pytest.fixture(scope='module')
def trained(lab):
    """A checkpoint of each form whose teacher is gone, with configs that still name it."""
    runs = {}
    for form in ('hook_form', 'model_form'):
        # A teacher of its own, to be deleted.
        teacher = lab.teacher(extra=f'\nnotes = {form!r}\n')
        # No threshold: two epochs of a tiny model detect nothing above one.
        config = getattr(lab, form)(lab.plain(val=True, model__test_cfg__score_thr=0.0), teacher)
        runner = lab.train(config)
        for path in teacher.values():
            os.remove(path)
        runs[form] = (config, os.path.join(runner.work_dir, 'epoch_1.pth'))
    return runs


def state_of(path):
    return torch.load(path, map_location='cpu', weights_only=False)['state_dict']


def test_the_distilled_model_predicts_what_the_plain_one_predicts(lab, trained):
    """Same modules, same outputs, no hook, no instance attribute on the way."""
    config, path = trained['model_form']
    plain, distilled = lab.build(lab.plain()).eval(), lab.build(config).eval()
    for model in (plain, distilled):
        model.load_state_dict(state_of(path), strict=True)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [n for n, _ in distilled.named_modules()] == [n for n, _ in plain.named_modules()]
    image = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        for ours, theirs in zip(distilled(image), plain(image), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_our_test_script_runs_the_plain_model_without_the_teacher(lab, trained, form, monkeypatch):
    config, path = trained[form]
    built = []
    runner = cli._runner
    monkeypatch.setattr(cli, '_runner', lambda cfg: built.append(runner(cfg)) or built[-1])
    metrics = cli.test([lab.dump(config, 'test.py'), path, '--work-dir', config.work_dir + '_test'])
    assert 'coco/bbox_mAP' in metrics
    model = built[0].model
    assert type(model).__name__ == 'YOLOX'
    assert [tuple(p.shape) for p in model.parameters()] == [tuple(p.shape) for p in lab.build(lab.plain()).parameters()]
    saved = state_of(path)
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_mmdets_own_test_script_runs_without_the_teacher(lab, trained, form, monkeypatch, capsys):
    """On the distilled config as it is; the weights that are evaluated are the checkpoint's."""
    config, path = trained[form]
    models = []
    from mmengine.runner import Runner

    test = Runner.test
    monkeypatch.setattr(Runner, 'test', lambda self: models.append(self.model) or test(self))
    dumped = lab.dump(config, 'test.py')
    monkeypatch.setattr(sys, 'argv', ['test.py', dumped, path, '--work-dir', config.work_dir + '_mmdet'])
    runpy.run_path(str(MMDET_TOOLS / 'test.py'), run_name='__main__')
    saved = state_of(path)
    assert all(torch.equal(v, saved[k]) for k, v in models[0].state_dict().items())
    # The teacher is gone, so there is nothing to build adapters for: the memory is the plain model's.
    assert len(list(models[0].parameters())) == len(list(lab.build(lab.plain()).parameters()))


def test_training_without_the_teacher_is_still_refused(lab, trained):
    """What test time tolerates, training does not."""
    from kd_plugins.errors import DistillError

    for config, _ in trained.values():
        with pytest.raises(DistillError, match='does not exist'):
            lab.train(config)


def test_test_time_augmentation_works_in_the_model_form(lab):
    """mmdet's TTA wraps the model that it builds from the config."""
    config = lab.model_form(lab.plain(val=True, model__test_cfg__score_thr=0.0), lab.teacher())
    runner = lab.train(config)
    path = os.path.join(runner.work_dir, 'epoch_1.pth')
    config.load_from = path
    config.work_dir += '_tta'
    config.experiment_name += '_tta'
    config.model = dict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.65), max_per_img=100),
        module=config.model,
    )
    config.test_dataloader.dataset.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(
            type='TestTimeAug',
            transforms=[
                [dict(type='Resize', scale=(96, 96), keep_ratio=True)],
                [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)],
                [dict(type='LoadAnnotations', with_bbox=True)],
                [
                    dict(
                        type='PackDetInputs',
                        meta_keys=(
                            'img_id',
                            'img_path',
                            'ori_shape',
                            'img_shape',
                            'scale_factor',
                            'flip',
                            'flip_direction',
                        ),
                    )
                ],
            ],
        ),
    ]
    config.train_dataloader = config.train_cfg = config.optim_wrapper = config.param_scheduler = None
    config.val_dataloader = config.val_cfg = config.val_evaluator = None
    config.custom_hooks = []
    config.default_hooks.pop('distill')
    config = Config(config.to_dict())
    metrics = lab.runner(config).test()
    assert 'coco/bbox_mAP' in metrics
