"""mmpretrain's ImageClassifier as student and teacher in MMEngine's Runner, where mmpretrain can be imported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

pytest.importorskip('mmpretrain')

from kd_plugins.errors import DistillError
from kd_plugins.losses import DKDLoss
from kd_plugins.mm.cli import add_distillation
from kd_plugins.mm.configs import load_config
from kd_plugins.mm.teacher import build_architecture

NAMES = ('cat', 'dog', 'owl')
CONFIG = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmpretrain.models', 'mmpretrain.datasets', 'mmpretrain.evaluation'],
                      allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=18, stem_channels=4, base_channels={width}, num_stages=2, strides=(1, 2),
                  dilations=(1, 1), out_indices=(0, 1)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels={width} * 2),
    train_cfg=dict(augments=dict(type='Mixup', alpha=1.0)))
data_preprocessor = dict(num_classes=3, mean=[120.0, 120.0, 120.0], std=[60.0, 60.0, 60.0], to_rgb=True)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(batch_size=3, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
                        dataset=dict(type='CustomDataset', data_root='{root}', pipeline=pipeline))
test_dataloader = val_dataloader = train_dataloader
test_evaluator = val_evaluator = dict(type='Accuracy', topk=(1,))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
randomness = dict(seed=0)
"""


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """Configs of a student and of a teacher that has the classes in another order, and its checkpoint."""
    folder = tmp_path_factory.mktemp('mmpretrain')
    random = np.random.default_rng(0)
    for name in NAMES:
        (folder / 'images' / name).mkdir(parents=True)
        for i in range(2):
            picture = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / 'images' / name / f'{i}.png')
    for name, width in (('student', 4), ('teacher', 8)):
        (folder / f'{name}.py').write_text(CONFIG.format(width=width, root=folder / 'images'))
    torch.manual_seed(0)
    network, _ = build_architecture(dict(config=str(folder / 'teacher.py')))
    # Confident, so that the classes differ.
    state = {k: v * 30 if k == 'head.fc.weight' else v for k, v in network.state_dict().items()}
    torch.save(dict(state_dict=state, meta=dict(dataset_meta=dict(classes=NAMES[::-1]))), folder / 'teacher.pth')
    return folder


def runner_of(lab, folder, recipe, *words):
    config = load_config(str(lab / 'student.py'), 'config')
    add_distillation(config, recipe, str(lab / 'teacher.py'), str(lab / 'teacher.pth'), words)
    config.work_dir = str(folder)
    return Runner.from_cfg(config)


def test_a_distilled_run(lab, tmp_path):
    """Both see the same mixed images, labels are the mixed ones, classes are matched by name; the student is usable."""
    runner = runner_of(lab, tmp_path, 'dkd', 'weight=1', 'start=0')
    hook = next(h for h in runner.hooks if type(h).__name__ == 'DistillHook')
    seen = dict(student=[], teacher=[], labels=[], losses=[])

    def watch(model, side):
        def keep(module, args, output):
            seen[side].append((images[side], output.detach().clone()))

        images = {}
        model.backbone.register_forward_pre_hook(lambda module, args: images.update({side: args[0].clone()}))
        model.head.register_forward_hook(keep)

    class Watch(type(hook).__mro__[1]):
        priority = 'LOWEST'

        def before_train(self, runner):
            watch(runner.model, 'student')
            watch(hook.session.teachers[''].model, 'teacher')
            runner.model.register_forward_hook(self.after, with_kwargs=True)

        @staticmethod
        def after(module, args, kwargs, output):
            if kwargs.get('mode') == 'loss':
                seen['labels'].append(torch.stack([s.gt_score for s in kwargs['data_samples']]))
                seen['losses'].append(output['loss_kd_logits'].detach())

    runner.register_hook(Watch())
    runner.train()

    assert len(seen['losses']) == 2
    assert not all(((label == 0) | (label == 1)).all() for label in seen['labels'])
    loss = hook.session.terms['logits'].loss
    assert isinstance(loss, DKDLoss)
    for (ours, student), (theirs, teacher), labels, value in zip(
        seen['student'], seen['teacher'], seen['labels'], seen['losses'], strict=False
    ):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(value, loss(student, teacher.flip(1), labels))
    assert (tmp_path / 'kd_student.py').is_file()
    assert json.loads(next(tmp_path.glob('*/kd_summary.json')).read_text())['best']

    from mmpretrain.apis import ImageClassificationInferencer

    use = ImageClassificationInferencer(str(tmp_path / 'kd_student.py'), str(tmp_path / 'kd_student.pth'), device='cpu')
    (found,) = use(str(lab / 'images' / 'cat' / '0.png'), show_dir=str(tmp_path / 'pictures'))
    assert found['pred_class'] in NAMES
    state = torch.load(tmp_path / 'kd_student.pth', weights_only=False)['state_dict']
    assert state.keys() == runner.model.state_dict().keys()


def test_features_by_stage(lab, tmp_path):
    """Recipes that tap stages find those of its backbone."""
    runner = runner_of(lab, tmp_path, 'vit_feature')
    hook = next(h for h in runner.hooks if type(h).__name__ == 'DistillHook')
    runner.train()
    assert [t.student.module for t in hook.session.terms.values()] == ['head', 'backbone', 'backbone']


def test_what_it_has_not_is_said(lab, tmp_path):
    with pytest.raises(DistillError, match="ImageClassifier has no module 'dist_logits'"):
        runner_of(lab, tmp_path, 'deit_token').train()
    config = Config.fromfile(str(lab / 'student.py'))
    config.model.head = dict(type='ArcFaceClsHead', num_classes=3, in_channels=8)
    add_distillation(config, 'kl', str(lab / 'teacher.py'), str(lab / 'teacher.pth'))
    config.work_dir = str(tmp_path)
    with pytest.raises(DistillError, match='Predictions of ArcFaceClsHead cannot be read: in training its logits hold'):
        Runner.from_cfg(config).train()
