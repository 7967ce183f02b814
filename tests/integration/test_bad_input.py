"""Wrong input is refused before the first iteration, in words that name it and what to write instead."""

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict

from kd_plugins.cli import main
from kd_plugins.errors import DistillError
from kd_plugins.mm import cli
from tests.integration.synthetic import Watch, dataloader, resnet18, save_teacher, short_run, train, write_coco, yolox

REPO = Path(__file__).parents[2]
CLASSES = ('cat', 'dog', 'cow')
HEADS = dict(student='bbox_head', teacher='bbox_head')
LOGITS = dict(loss=dict(type='YOLOLogitLoss'), **HEADS)
NECK = dict(loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck')
CLASS_KL = dict(loss=dict(type='BinaryKLDivLoss'), **HEADS)


# ---------------------------------------------------------------------- what a case changes
class Run:
    """A distilled run that would work, to be spoilt.

    Attributes:
        files: Folder with teachers and damaged checkpoints.
        config: The student's config.
        distill: Its ``teacher`` and ``terms``.
        form: ``'hook'`` or ``'model'``.
        hooked: Whether the hook stands in ``default_hooks``.
    """

    def __init__(self, files, work_dir):
        self.files, self.form, self.hooked = files, 'hook', True
        self.config = short_run(yolox(3), work_dir, dataloader(files / 'data', CLASSES))
        self.distill = ConfigDict(
            teacher=dict(config=str(files / 'teacher.py'), checkpoint=str(files / 'teacher.pth')),
            terms=dict(logits=LOGITS),
        )

    def finish(self):
        hook = dict(type='kd_plugins.DistillHook')
        if self.form == 'model':
            model = dict(type='kd_plugins.Distilled', student_type=self.config.model.type, distill=self.distill)
            self.config.model = ConfigDict({**self.config.model, **model})
        else:
            hook.update(self.distill)
        if self.hooked:
            self.config.default_hooks.setdefault('distill', hook)
        return self.config


def put(path, value):
    """Set an entry of ``distill``; ``{}`` in a text stands for the folder of the files."""

    def change(run):
        *parents, last = path.split('.')
        place: Any = run.distill
        for key in parents:
            place = place[key]
        place[last] = value.format(run.files) if isinstance(value, str) else value

    return change


def drop(key):
    return lambda run: run.distill.pop(key)


def teacher(name, **options):
    """Another teacher: ``<name>.py`` and ``<name>.pth``."""

    def change(run):
        config, checkpoint = (str(run.files / f'{name}.{end}') for end in ('py', 'pth'))
        run.distill.teacher = ConfigDict(config=config, checkpoint=checkpoint, **options)

    return change


def term(value):
    return put('terms.logits', value)


def form(name):
    return lambda run: setattr(run, 'form', name)


def student(make):
    def change(run):
        run.config = short_run(make(), run.config.work_dir, dataloader(run.files / 'data', CLASSES))

    return change


def config(**entries):
    def change(run):
        for key, value in entries.items():
            run.config[key] = value.format(run.files) if isinstance(value, str) else value

    return change


def hook(**entries):
    return lambda run: run.config.default_hooks.update(distill=dict(type='kd_plugins.DistillHook', **entries))


def without_hook(run):
    run.hooked = False


def in_custom_hooks(run):
    run.config.custom_hooks = [dict(type='kd_plugins.DistillHook', **run.distill)]
    run.hooked = False


# ---------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Case:
    """``changes`` to a working run and the words that the error must contain."""

    name: str
    changes: tuple
    words: tuple
    error: type = DistillError


def case(name, *changes, says, error=DistillError):
    return Case(name, changes, (says,) if isinstance(says, str) else says, error)


CASES = [
    # --- spelling, at each level
    case('unknown option of distill', put('term', {}), says=("'term'", "did you mean 'terms'")),
    case('unknown option of a term', put('terms.logits.wieght', 1), says=("'wieght'", "did you mean 'weight'")),
    case('unknown option of teacher', put('teacher.chekpoint', 'x'), says=("'chekpoint'", "did you mean 'checkpoint'")),
    case(
        'unknown option of a loss',
        term(dict(CLASS_KL, loss=dict(type='BinaryKLDivLoss', temprature=2))),
        says=("'temprature'", 'BinaryKLDivLoss', "did you mean 'temperature'"),
    ),
    case(
        'unknown option of a schedule',
        put('terms.logits.weight', dict(type='linear', start=0, end=1, unti=1)),
        says=("'unti'", "did you mean 'until'"),
    ),
    case(
        'unknown loss',
        put('terms.logits.loss.type', 'YoloLogitLoss'),
        says=("'YoloLogitLoss'", "did you mean 'YOLOLogitLoss'"),
    ),
    case('loss without type', put('terms.logits.loss', 'YOLOLogitLoss'), says=("'YOLOLogitLoss'", "dict(type='...'")),
    case(
        'unknown adapter',
        form('model'),
        term(dict(NECK, adapter=dict(type='ConvAdaptor'))),
        says=("'ConvAdaptor'", "did you mean 'ConvAdapter'"),
    ),
    case('adapter is a name', term(dict(NECK, adapter='none')), says=("'none'", "'auto', None, dict(type=...)")),
    case(
        'adapter on predictions',
        put('terms.logits.adapter', dict(type='ResizeAdapter')),
        says=('YOLOLogitLoss', 'take no adapter'),
    ),
    case('teacher is missing', drop('teacher'), says=("'teacher' is missing", "'teacher' and 'terms'")),
    case('terms are missing', drop('terms'), says=("'terms' is missing",)),
    case(
        'teacher is a name',
        put('teacher', 'teacher.pth'),
        says=("'teacher.pth'", "dict(config='mmdet::...', checkpoint="),
    ),
    case('terms are empty', put('terms', {}), says=('terms is empty', 'terms=dict(logits=')),
    case('terms are a list', put('terms', [LOGITS]), says=('must be a dict', 'list')),
    case(
        'a term without tap', term(dict(loss=LOGITS['loss'], student='neck')), says=("'logits'", "'teacher' is missing")
    ),
    case('a term that cannot be logged', put('terms', {'my-term': LOGITS}), says=("'my-term'", 'identifier')),
    case(
        'options that nothing reads',
        config(teacher=dict(checkpoint='better.pth')),
        says=("teacher.checkpoint = 'better.pth'", 'default_hooks.distill.teacher.checkpoint'),
    ),
    # --- taps
    case(
        'student tap does not exist',
        put('terms.logits.student', 'bbox_haed'),
        says=("student: YOLOX has no module 'bbox_haed'", "'bbox_head'"),
    ),
    case(
        'teacher tap does not exist',
        put('terms.logits.teacher', 'neck.fpn'),
        says=("teacher: YOLOX has no module 'neck.fpn'", "neck has the children 'upsample', 'reduce_layers'"),
    ),
    case('tap is no path', put('terms.logits.student', 'neck[1'), says=("'neck[1'", "like 'neck' or 'neck[1]'")),
    case(
        'tap never runs',
        term(dict(NECK, student='bbox_head.loss_cls')),
        says=("'bbox_head.loss_cls'", 'did not run', 'tap a module that takes part'),
    ),
    case('tap index is out of range', term(dict(NECK, student='neck[7]')), says=("'neck[7]'", '3 tensors (0 to 2)')),
    case(
        'channels differ and adapter=None',
        term(dict(NECK, adapter=None)),
        says=("student 'neck' is", "teacher 'neck' is", "adapter='auto'"),
    ),
    # --- the teacher's files
    case(
        'checkpoint is missing',
        put('teacher.checkpoint', '{}/teachr.pth'),
        says=("teachr.pth' does not exist", "did you mean 'teacher.pth'"),
    ),
    case('checkpoint is not given', lambda run: run.distill.teacher.pop('checkpoint'), says=("needs 'checkpoint'",)),
    case('checkpoint is a folder', put('teacher.checkpoint', '{}'), says=('is a folder', 'coarse.pth')),
    case(
        'checkpoint is in no folder',
        put('teacher.checkpoint', '{}/models/teacher.pth'),
        says=('does not exist', "/models' does not exist either"),
    ),
    case(
        'checkpoint cannot be downloaded',
        put('teacher.checkpoint', 'http://127.0.0.1:9/teacher.pth'),
        says=("'http://127.0.0.1:9/teacher.pth' could not be downloaded", 'give a local file'),
    ),
    case(
        'checkpoint is truncated',
        put('teacher.checkpoint', '{}/truncated.pth'),
        says=('truncated.pth', 'may be truncated'),
    ),
    case('checkpoint is garbage', put('teacher.checkpoint', '{}/garbage.pth'), says=('garbage.pth', 'not a readable')),
    case('checkpoint is empty', put('teacher.checkpoint', '{}/empty.pth'), says=('empty.pth', '(0 bytes)')),
    case(
        'checkpoint holds no weights',
        put('teacher.checkpoint', '{}/no_weights.pth'),
        says=('holds no weights', "'meta'", 'state_dict'),
    ),
    case(
        'checkpoint of another architecture',
        put('teacher.checkpoint', '{}/gfl.pth'),
        says=('gfl.pth', 'does not fit YOLOX', 'missing', 'unexpected', 'teacher.config'),
    ),
    case(
        'checkpoint of another width',
        put('teacher.checkpoint', '{}/small.pth'),
        says=('small.pth', 'of another shape', 'in the file and', 'in the model', 'width, number of classes'),
    ),
    case(
        'checkpoint without some keys',
        put('teacher.checkpoint', '{}/partial.pth'),
        says=('partial.pth', 'keys missing (neck.', 'teacher.allow_missing'),
    ),
    case(
        'allow_missing is a name',
        put('teacher.allow_missing', 'neck'),
        says=('teacher.allow_missing', 'must be a list', "'neck'"),
    ),
    case(
        'config is misspelt',
        put('teacher.config', 'mmdet::yolox/yolox_lage_8xb8-300e_coco.py'),
        says=("'mmdet::yolox/yolox_lage_8xb8-300e_coco.py'", 'did you mean', 'mmdet::yolox/yolox_l_8xb8-300e_coco.py'),
    ),
    case(
        'config of a package that is not installed',
        put('teacher.config', 'mmfoo::a.py'),
        says=("'mmfoo'", 'not installed'),
    ),
    case(
        'config file is missing',
        put('teacher.config', '{}/teachr.py'),
        says=('teachr.py', 'did you mean', 'teacher.py'),
    ),
    case(
        'config is not given',
        lambda run: run.distill.teacher.pop('config'),
        says=('does not say which network it is', "dict(config='...', checkpoint=...)"),
    ),
    case('config without model', put('teacher.config', '{}/no_model.py'), says=('no_model.py', "has no 'model'")),
    case('config with a syntax error', put('teacher.config', '{}/syntax.py'), says=('syntax.py', 'cannot be read')),
    case(
        'config of an unknown model',
        put('teacher.config', '{}/unknown.py'),
        says=('unknown.py', 'YOLOXX', 'cannot be built'),
    ),
    # --- classes
    case(
        'no class in common',
        teacher('disjoint'),
        says=('no class in common', "'cat'", "'boat'", 'classes=[...] with the names'),
    ),
    case(
        'class names unknown and counts different',
        teacher('nameless'),
        says=('student has 3 classes and the teacher 5', 'classes=[...] in teacher'),
    ),
    case(
        'wrong number of class names',
        teacher('nameless', classes=['cat', 'dog']),
        says=('teacher.classes has 2 names', 'predicts 5 classes'),
    ),
    case('class names are a text', teacher('nameless', classes='cat,dog'), says=("'cat,dog'", 'must be a list')),
    case(
        'two classes of one name',
        teacher('nameless', classes=['cat', 'dog', 'cat', 'cow', 'fox']),
        says=("two classes named 'cat'",),
    ),
    # --- numbers
    case('negative weight', put('terms.logits.weight', -0.5), says=("'logits': weight", '-0.5', '>= 0')),
    case('NaN weight', put('terms.logits.weight', float('nan')), says=("'logits': weight", 'nan', 'finite')),
    case('weight is a text', put('terms.logits.weight', 'high'), says=("'logits': weight", "'high'", 'number')),
    case('loss of weight zero', put('terms.logits.loss.cls_weight', -1), says=('cls_weight', '-1', '>= 0')),
    case(
        'temperature 0',
        term(dict(CLASS_KL, loss=dict(type='BinaryKLDivLoss', temperature=0))),
        says=('temperature', 'got 0', '> 0'),
    ),
    case(
        'scheduled temperature 0',
        term(dict(CLASS_KL, temperature=dict(type='linear', start=4, end=0))),
        says=('temperature.end', '> 0', '0'),
    ),
    case(
        'loss without temperature',
        put('terms.logits.temperature', 4.0),
        says=('YOLOLogitLoss has no temperature', 'remove'),
    ),
    case(
        'unknown schedule',
        put('terms.logits.weight', dict(type='cosin', start=0, end=1)),
        says=("'cosin'", "did you mean 'cosine'"),
    ),
    case('schedule without end', put('terms.logits.weight', dict(type='linear', start=0)), says=("'end' is missing",)),
    case(
        'schedule in epochs',
        put('terms.logits.weight', dict(type='linear', start=0, end=1, until=100)),
        says=('a fraction of the run', '100'),
    ),
    case('start after the end of the run', put('start', 3), says=('start=3', '1 epochs', 'never run')),
    case('stop before start', lambda run: run.distill.update(start=2, stop=1), says=('stop (1)', 'start (2)')),
    case('start is a fraction', put('start', 0.5), says=('start', '0.5', 'whole number of epochs')),
    case('negative stop', put('stop', -1), says=('stop', '-1', 'whole number')),
    # --- what cannot be distilled
    case(
        'a head without reader as teacher',
        teacher('vfnet'),
        says=("'logits': teacher 'bbox_head'", 'VFNetHead', 'Supported heads:', 'GFLHead', 'register_reader'),
    ),
    case(
        'a head without reader as student',
        student(lambda: resnet18('vfnet/vfnet_r50_fpn_1x_coco.py', 3)),
        says=("'logits': student 'bbox_head'", 'VFNetHead', 'Supported heads:', 'YOLOXHead'),
    ),
    case(
        'a two-stage teacher',
        teacher('faster_rcnn'),
        put('terms.logits.teacher', 'roi_head'),
        says=('StandardRoIHead', 'Supported heads:'),
    ),
    case('NaN in the weights of the teacher', teacher('nan'), says=('NaN', "'bbox_head'", 'checkpoint')),
    case('overflow in the outputs of the teacher', teacher('overflow'), says=('infinite', "'bbox_head'", 'checkpoint')),
    case('a prediction loss on features', term(dict(LOGITS, student='neck')), says=('YOLOXPAFPN', 'Supported heads:')),
    case(
        'a prediction loss on one output',
        term(dict(LOGITS, student='bbox_head[0]')),
        says=("write 'bbox_head'", 'bbox_head[0]'),
    ),
    case(
        'distance bins of heads without',
        put('terms.logits.loss', dict(type='LocalizationDistillLoss')),
        says=('LocalizationDistillLoss', 'bins', 'GFL', 'YOLOLogitLoss(obj_weight=0, cls_weight=0)'),
    ),
    case(
        'a loss of nothing',
        put('terms.logits.loss', dict(type='YOLOLogitLoss', obj_weight=0, box_weight=0, cls_weight=0)),
        says=('obj_weight, box_weight and cls_weight are all 0',),
    ),
    case('pyramids without a common stride', teacher('coarse'), says=('no level in common', '8.0', '64')),
    # --- where it is written
    case('hook in custom_hooks', in_custom_hooks, says=('custom_hooks', 'default_hooks=dict(distill=')),
    case(
        'Distilled without hook',
        form('model'),
        without_hook,
        says=('no DistillHook is running', "default_hooks = dict(distill=dict(type='kd_plugins.DistillHook'))"),
    ),
    case(
        'Distilled, and options in the hook',
        form('model'),
        hook(start=1),
        says=("take 'start' out of", 'default_hooks.distill'),
    ),
    case(
        'Distilled of an unknown model',
        form('model'),
        lambda run: run.config.model.update(type='YOLOY'),
        says=("student_type 'YOLOY'", "'YOLOX'"),
    ),
    case(
        'distilled run resumed from a plain one',
        form('model'),
        term(NECK),
        config(load_from='{}/plain_run.pth', resume=True),
        says=('holds no adapters', 'load_from without --resume'),
    ),
    # MMEngine looks names up before any of our code runs. `tools/train.py` also names the right one (see below).
    case(
        'hook of a wrong scope',
        hook(),
        lambda run: run.config.default_hooks.distill.update(type='kd_plugin.DistillHook'),
        says='kd_plugin.DistillHook',
        error=KeyError,
    ),
]


# ---------------------------------------------------------------------- the run
@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A user's files: data, teachers, and checkpoints damaged in every way."""
    folder = tmp_path_factory.mktemp('user') / 'files'
    write_coco(folder / 'data', CLASSES)
    torch.manual_seed(0)
    made = save_teacher(yolox(3, 0.25), folder, CLASSES)
    save_teacher(yolox(3, 0.25), folder, ('boat', 'car', 'bus'), 'disjoint')
    save_teacher(yolox(5, 0.25), folder, None, 'nameless')
    save_teacher(yolox(3, 0.125), folder, CLASSES, 'small')
    save_teacher(resnet18('gfl/gfl_r50_fpn_1x_coco.py', 3), folder, CLASSES, 'gfl')
    save_teacher(resnet18('vfnet/vfnet_r50_fpn_1x_coco.py', 3), folder, CLASSES, 'vfnet')
    save_teacher(faster_rcnn(), folder, CLASSES, 'faster_rcnn')
    coarse = resnet18('gfl/gfl_r50_fpn_1x_coco.py', 3)
    coarse.model.bbox_head.anchor_generator.strides = [64, 128, 256, 512, 1024]
    save_teacher(coarse, folder, CLASSES, 'coarse')
    save_teacher(yolox(3, 0.25), folder, CLASSES, 'nan', edit=_fill('bbox_head', 'cls.0.bias', float('nan')))
    # exp(100) is infinite in float32: the raw output is not.
    save_teacher(yolox(3, 0.25), folder, CLASSES, 'overflow', edit=_fill('bbox_head', 'reg.0.bias', 100.0))
    save_teacher(yolox(3), folder, CLASSES, 'plain')

    content = Path(made['checkpoint']).read_bytes()
    (folder / 'truncated.pth').write_bytes(content[: len(content) // 2])
    (folder / 'garbage.pth').write_bytes(b'<html>404 not found</html>' * 40)
    (folder / 'empty.pth').touch()
    torch.save(dict(meta=dict(epoch=3)), folder / 'no_weights.pth')
    checkpoint = torch.load(made['checkpoint'], weights_only=False)
    checkpoint['state_dict'] = {k: v for k, v in checkpoint['state_dict'].items() if not k.startswith('neck')}
    torch.save(checkpoint, folder / 'partial.pth')
    (folder / 'no_model.py').write_text('optimizer = dict(lr=1)\n')
    (folder / 'syntax.py').write_text('model = dict(type=\n')
    (folder / 'unknown.py').write_text("default_scope = 'mmdet'\nmodel = dict(type='YOLOXX')\n")
    run = short_run(yolox(3), folder.parent / 'plain_run', dataloader(folder / 'data', CLASSES))
    _, runner = train(run)
    Path(runner.work_dir, 'epoch_1.pth').rename(folder / 'plain_run.pth')
    return folder


def faster_rcnn():
    made = Config.fromfile(cli.load_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py').filename)
    made.model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    made.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    made.model.rpn_head.update(in_channels=16, feat_channels=16)
    made.model.roi_head.bbox_roi_extractor.out_channels = 16
    made.model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=16, num_classes=3)
    return made


def _fill(start, end, value):
    def edit(state):
        key = next(k for k in state if k.startswith(start) and k.endswith(end))
        state[key].fill_(value)

    return edit


def fingerprint(folder):
    """Every file below a folder, with its content."""
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.mark.parametrize('case', CASES, ids=lambda c: c.name.replace(' ', '_'))
def test_refused_before_the_first_iteration(case, files, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
    (tmp_path / 'epoch_9.pth').write_bytes(b'an earlier run')
    run = Run(files, tmp_path)
    for change in case.changes:
        change(run)
    before, watch = fingerprint(files), Watch()
    with pytest.raises(case.error) as caught:
        train(run.finish(), watch)
    message = str(caught.value)
    missing = [word for word in case.words if word not in message]
    assert not missing, f'{missing} not in: {message}'
    assert 'Traceback' not in message and len(message) < 700
    # Nothing was trained, and nothing of the user's was touched.
    assert watch.steps == 0 and not watch.losses
    assert fingerprint(files) == before
    assert [(p.name, p.read_bytes()) for p in tmp_path.glob('*.pth')] == [('epoch_9.pth', b'an earlier run')]


def test_table_is_complete():
    assert len(CASES) >= 35
    assert len({c.name for c in CASES}) == len(CASES)


# ---------------------------------------------------------------------- what looks wrong and is not
@pytest.mark.parametrize('teacher_name', ['teacher', 'gfl'])
def test_images_without_boxes_are_distilled(teacher_name, files, tmp_path):
    run = Run(files, tmp_path)
    teacher(teacher_name)(run)
    run.distill.terms = dict(logits=dict(LOGITS, loss=dict(type='YOLOLogitLoss')))
    run.config.train_dataloader.batch_size = 1  # the last image has no box
    watch, _ = train(run.finish())
    assert watch.steps == 4
    assert all(losses['loss_kd_logits'] > 0 for losses in watch.losses)
    assert all(torch.isfinite(g).all() for g in watch.gradients.values())


def test_checkpoint_with_the_raw_weights_of_mmdet_2_ema(files, tmp_path):
    """YOLOX checkpoints of mmdet 2 hold every weight twice."""
    checkpoint = torch.load(files / 'teacher.pth', weights_only=False)
    state = checkpoint['state_dict']
    state.update({'ema_' + k.replace('.', '_'): torch.full_like(v, 7) for k, v in list(state.items())})
    torch.save(checkpoint, tmp_path / 'mmdet2.pth')
    run = Run(files, tmp_path)
    run.distill.teacher.checkpoint = str(tmp_path / 'mmdet2.pth')
    watch, runner = train(run.finish())
    assert watch.steps == 2
    taught = next(h for h in runner.hooks if type(h).__name__ == 'DistillHook').session.teacher
    assert not any((p == 7).all() for p in taught.model.parameters())


# ---------------------------------------------------------------------- the command line
@pytest.fixture
def plain_config(files, tmp_path):
    path = tmp_path / 'plain.py'
    short_run(yolox(3), tmp_path / 'run', dataloader(files / 'data', CLASSES)).dump(str(path))
    return str(path)


KD = '--kd yolo_logit --teacher {files}/teacher.py --teacher-checkpoint {files}/teacher.pth'
COMMANDS = [
    ('{config}x', ("plain.pyx' does not exist", 'did you mean')),
    ('mmdet::yolox/yolox_tni.py', ('yolox_tni.py', 'did you mean')),
    ('{config} --kd yolo_logit', ('--teacher and --teacher-checkpoint is missing', 'go together')),
    ('{config} ' + KD.replace('yolo_logit', 'yolo_logits'), ("'yolo_logits'", "did you mean 'yolo_logit'")),
    ('{config} ' + KD.replace('teacher.py', 'teachr.py'), ('teachr.py', 'teacher.py')),
    ('{config} ' + KD.replace('teacher.pth', 'teachr.pth'), ('teachr.pth', "did you mean 'teacher.pth'")),
    ('{config} ' + KD.replace('yolo_logit', '{files}/no_model.py'), ("'optimizer'", 'recipe')),
    (
        '{config} --kd yolo_logit --teacher a.pt --teacher-checkpoint b.pth',
        ('--teacher-checkpoint', "'a.pt' holds weights itself"),
    ),
    ('{config} --kd yolo_logit --teacher {files}/none.pt', ('none.pt', 'does not exist')),
    ('{config} --teacher {files}/none.pt', ('--kd is missing',)),
    ('{config} --auto-scale-lr', ('auto_scale_lr', 'base_batch_size')),
    (
        '{config} --cfg-options default_hooks.distill.type=kd_plugin.DistillHook',
        ("'kd_plugin.DistillHook'", "did you mean 'kd_plugins.DistillHook'"),
    ),
    ('{config} --cfg-options model.type=kd_plugins.Distil', ("'kd_plugins.Distil'", "'kd_plugins.Distilled'")),
]


@pytest.mark.parametrize(('arguments', 'words'), COMMANDS, ids=[str(i) for i in range(len(COMMANDS))])
def test_command_line_ends_with_one_sentence(arguments, words, plain_config, files):
    before = fingerprint(files)
    argv = arguments.format(config=plain_config, files=files).split()
    if '--auto-scale-lr' in argv:
        config = Config.fromfile(plain_config)
        config.pop('auto_scale_lr')
        config.dump(plain_config)
    with pytest.raises(SystemExit) as caught:
        main(['train', *argv])
    message = caught.value.code
    assert isinstance(message, str) and message.startswith('error: ') and '\n' not in message
    assert all(word in message for word in words), message
    assert fingerprint(files) == before


def test_command_in_a_process_of_its_own(plain_config, files, tmp_path):
    command = f'tools/train.py {plain_config} ' + KD.format(files=files).replace('teacher.pth', 'truncated.pth')
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=REPO,
        env={**os.environ, 'PYTHONPATH': str(REPO)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 1
    assert 'Traceback' not in done.stderr
    assert re.search(r"^error: teacher\.checkpoint '.*truncated\.pth' .* may be truncated", done.stderr, re.M)


def test_evaluation_of_a_missing_checkpoint(plain_config, files):
    with pytest.raises(SystemExit, match=r"plani\.pth' does not exist; did you mean .*plain\.pth'"):
        main(['test', plain_config, f'{files}/plani.pth'])
