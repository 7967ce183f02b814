"""Logit distillation between detector families, through the Runner: levels, classes and boxes are matched."""

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.mm.cli import add_distillation
from tests.integration.synthetic import dataloader, resnet18, save_teacher, short_run, train, write_coco, yolox

TEACHER_CLASSES = ('cat', 'dog', 'horse', 'sheep', 'cow')
STUDENT_CLASSES = ('cow', 'cat', 'sheep')
HEADS = dict(student='bbox_head', teacher='bbox_head')
TERMS = dict(
    cls=dict(loss=dict(type='BinaryKLDivLoss', foreground=True), **HEADS),
    box=dict(loss=dict(type='YOLOLogitLoss', obj_weight=0, cls_weight=0), weight=0.25, **HEADS),
)
GFL = 'gfl/gfl_r50_fpn_1x_coco.py'
RETINANET = 'retinanet/retinanet_r50_fpn_1x_coco.py'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp('data'), STUDENT_CLASSES, images=4)


def run(student, teacher, data, work_dir, terms=TERMS, classes=STUDENT_CLASSES):
    """One epoch; returns the losses of the first iteration, the distiller and the watch."""
    config = short_run(student, work_dir, dataloader(data, classes))
    config.default_hooks.distill = dict(type='kd_plugins.DistillHook', teacher=teacher, terms=terms)
    config.default_hooks.checkpoint = None
    config.randomness = dict(seed=0)
    watch, runner = train(config)
    return watch, next(h for h in runner.hooks if type(h).__name__ == 'DistillHook').session


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        (yolox, lambda n: resnet18(GFL, n)),  # 3 levels learn from 5
        (lambda n: resnet18(GFL, n), yolox),  # 5 levels, of which 3 are taught
        (yolox, lambda n: resnet18(RETINANET, n)),  # one prior per location learns from nine
    ],
    ids=['yolox_from_gfl', 'gfl_from_yolox', 'yolox_from_retinanet'],
)
def test_families_teach_each_other_classes_and_boxes(student, teacher, data, tmp_path):
    taught = save_teacher(teacher(5), tmp_path, TEACHER_CLASSES)
    watch, distiller = run(student(3), taught, data, tmp_path / 'run')
    # cow, cat and sheep of the student are classes 4, 0 and 3 of the teacher.
    assert distiller.classes == {'': ([0, 1, 2], [4, 0, 3])}
    for losses in watch.losses:
        assert losses['loss_kd_cls'] > 0
        assert losses['loss_kd_box'] > 0
    assert watch.steps == 2
    assert all(torch.isfinite(g).all() for g in watch.gradients.values())


def test_class_term_reads_the_class_of_the_same_name(data, tmp_path):
    """A teacher that answers 'sheep' everywhere raises the student's 'sheep', its third class, and no other."""

    def sheep_everywhere(state):
        for level in range(3):
            state[f'bbox_head.multi_level_conv_cls.{level}.weight'].zero_()
            state[f'bbox_head.multi_level_conv_cls.{level}.bias'].copy_(torch.tensor([-6.0, -6.0, -6.0, 6.0, -6.0]))

    taught = save_teacher(yolox(5), tmp_path, TEACHER_CLASSES, edit=sheep_everywhere)
    watch, _ = run(yolox(3), taught, data, tmp_path / 'run', terms=dict(cls=dict(TERMS['cls'], weight=1000.0)))
    for level in range(3):
        # Descent goes against the gradient: up for sheep, down for the other two.
        cow, cat, sheep = watch.gradients[f'bbox_head.multi_level_conv_cls.{level}.bias']
        assert sheep < 0 < min(cow, cat)


def test_boxes_of_another_family_are_compared_where_they_are(data, tmp_path):
    """Boxes that decode to the same have no loss, although the raw outputs are of different kinds."""

    def boxes_of_one_stride(state):  # all bins' weight on distance 0.5: a box of one stride around each point
        state['bbox_head.gfl_reg.weight'].zero_()
        bins = torch.full((4, 17), -50.0)
        bins[:, :2] = 0.0
        state['bbox_head.gfl_reg.bias'].copy_(bins.flatten())
        for level in range(5):
            state[f'bbox_head.scales.{level}.scale'].fill_(1.0)

    taught = save_teacher(resnet18(GFL, 3), tmp_path, STUDENT_CLASSES, edit=boxes_of_one_stride)
    student = yolox(3)
    # Zero offset and log size: a box of one stride around each point as well.
    config = save_teacher(student, tmp_path, name='student', edit=_zero_regression)
    student.load_from = config['checkpoint']
    watch, distiller = run(student, taught, data, tmp_path / 'run', terms=dict(box=TERMS['box']))
    assert distiller.classes == {'': None}
    assert 0 <= watch.losses[0]['loss_kd_box'] < 1e-6


def _zero_regression(state):
    for level in range(3):
        state[f'bbox_head.multi_level_conv_reg.{level}.weight'].zero_()
        state[f'bbox_head.multi_level_conv_reg.{level}.bias'].zero_()


def test_nameless_teacher_is_given_its_class_names(data, tmp_path):
    nameless = save_teacher(resnet18(GFL, 5), tmp_path)
    with pytest.raises(DistillError, match=r'student has 3 classes and the teacher 5.*classes=\[\.\.\.\] in teacher'):
        run(yolox(3), nameless, data, tmp_path / 'refused')
    _, distiller = run(yolox(3), dict(nameless, classes=list(TEACHER_CLASSES)), data, tmp_path / 'run')
    assert distiller.classes == {'': ([0, 1, 2], [4, 0, 3])}


def test_recipe_on_the_command_line(data, tmp_path):
    """``--kd binary_kl`` is the cross-family recipe."""
    taught = save_teacher(resnet18(GFL, 5), tmp_path, TEACHER_CLASSES)
    config = short_run(yolox(3), tmp_path / 'run', dataloader(data, STUDENT_CLASSES))
    add_distillation(config, 'binary_kl', taught['config'], taught['checkpoint'])
    watch, _ = train(config)
    assert all(losses['loss_kd_cls'] > 0 and losses['loss_kd_box'] > 0 for losses in watch.losses)
