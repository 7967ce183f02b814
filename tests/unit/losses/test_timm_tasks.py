"""The losses of timm's distillation tasks and of the DeiT paper are ours with the right weights.

timm (``timm.task``, 1.0.31) and ours, for a term of weight w beside the student's own loss:

* ``LogitDistillationTask`` is `kl_div` with the same temperature: timm's reduction is ``'batchmean'`` times T^2; ours,
  a sum over the classes and a mean over the images times T^2, is the same. Its ``loss`` is ``task_loss_weight * task +
  distill_loss_weight * kd``: both are 1 when neither is given; with ``task_loss_weight`` = a alone the other is 1 - a
  (``alpha`` = 1 - a of a distillation); with ``distill_loss_weight`` alone the task's is 1.
* ``TokenDistillationTask`` does the same on the distillation head, with ``distill_type='soft'``; ``'hard'`` is
  `hard_label`, and ignores the temperature.
* The DeiT paper's (arXiv 2012.12877) equation 2 is lambda tau^2 KL, so lambda `kl_div`, and 1 - lambda of the
  cross-entropy; equation 3 is one half of `hard_label` and of the cross-entropy.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from kd_plugins.losses import HardLabelLoss, KLDivLoss, hard_label, kl_div

timm = pytest.importorskip('timm')
tasks = pytest.importorskip('timm.task')

CLASSES = 7


@pytest.fixture(scope='module')
def teacher():
    """Random, but of large and different logits, in another normalisation than the student's."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=CLASSES).eval()
    with torch.no_grad():
        model.get_classifier().weight.mul_(40.0)
    return model


@pytest.fixture(scope='module')
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 32, 32, generator=generator), torch.tensor([0, 3, 6, 3, 1])


def new_student(name, **options):
    torch.manual_seed(2)
    return timm.create_model(
        name, img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=CLASSES, **options
    ).train()


def teacher_logits(task, teacher, images):
    """As the student's images reach the teacher: in its own normalisation."""
    config = task.trainable_module.pretrained_cfg
    ours, theirs = (
        [torch.tensor(c[key]).view(3, 1, 1) for key in ('mean', 'std')] for c in (config, teacher.pretrained_cfg)
    )
    assert not torch.equal(ours[0], theirs[0])
    with torch.no_grad():
        return teacher((images * ours[1] + ours[0] - theirs[0]) / theirs[1])


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def assert_same(loss, expected, model):
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients(expected, model), gradients(loss, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


#: timm's options, then the weights of the task's loss and of our term.
WEIGHTS = [
    ({}, 1.0, 1.0),
    (dict(task_loss_weight=0.3), 0.3, 0.7),
    (dict(distill_loss_weight=2.0), 1.0, 2.0),
    (dict(task_loss_weight=0.5, distill_loss_weight=0.25), 0.5, 0.25),
]
every_weighting = pytest.mark.parametrize('options, task_weight, weight', WEIGHTS, ids=['none', 'task', 'kd', 'both'])


@every_weighting
@pytest.mark.parametrize('temperature', [1.0, 3.0])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_logit_distillation_task(teacher, batch, options, task_weight, weight, temperature, smoothing):
    images, labels = batch
    student = new_student('deit_tiny_patch16_224')
    task = tasks.LogitDistillationTask(
        student, teacher, criterion_kwargs=dict(smoothing=smoothing), temperature=temperature, verbose=False, **options
    ).train()
    found = task(images, labels)
    logits, taught = student(images), teacher_logits(task, teacher, images)
    own = cross_entropy(logits, labels, label_smoothing=smoothing)
    kd = kl_div(logits, taught, temperature=temperature)
    assert found['kd_loss'].item() == pytest.approx(kd.item(), rel=1e-5) and kd > 0.01
    assert_same(found['loss'], task_weight * own + weight * kd, student)


@every_weighting
@pytest.mark.parametrize('distill_type, temperature', [('soft', 1.0), ('soft', 3.0), ('hard', 1.0), ('hard', 3.0)])
def test_token_distillation_task(teacher, batch, options, task_weight, weight, distill_type, temperature):
    """The class head learns the labels, the distillation head the teacher."""
    images, labels = batch
    student = new_student('deit_tiny_distilled_patch16_224')
    task = tasks.TokenDistillationTask(
        student, teacher, distill_type=distill_type, temperature=temperature, verbose=False, **options
    ).train()
    found = task(images, labels)
    class_logits, dist_logits = student(images)
    taught = teacher_logits(task, teacher, images)
    loss = KLDivLoss(temperature) if distill_type == 'soft' else HardLabelLoss()
    kd = loss(dist_logits, taught)
    assert found['distill_loss'].item() == pytest.approx(kd.item(), rel=1e-5) and kd > 0.01
    assert kd.item() != pytest.approx(loss(class_logits, taught).item(), rel=1e-3)
    assert_same(found['loss'], task_weight * cross_entropy(class_logits, labels) + weight * kd, student)


# ------------------------------------------------------------------ the paper, in numpy
def psi(logits):
    """Softmax."""
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


def ce(probabilities, labels):
    return -np.log(probabilities[np.arange(len(labels)), labels]).mean()


def kl(p, q):
    return (p * np.log(p / q)).sum(1).mean()


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(6, CLASSES, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.tensor([0, 3, 6, 3, 1, 2])


@pytest.mark.parametrize('weight, tau', [(0.1, 3.0), (0.5, 1.0), (0.9, 4.0)])
def test_soft_distillation_of_deit(logits, weight, tau):
    """Equation 2; lambda = 0.1 and tau = 3 are the paper's. KL is that of the student from the teacher, as Hinton's."""
    student, teacher, labels = logits
    z_s, z_t, y = student.numpy(), teacher.numpy(), labels.numpy()
    paper = (1 - weight) * ce(psi(z_s), y) + weight * tau**2 * kl(psi(z_t / tau), psi(z_s / tau))
    ours = (1 - weight) * cross_entropy(student, labels) + weight * kl_div(student, teacher, temperature=tau)
    assert ours.item() == pytest.approx(paper, rel=1e-12)


def test_soft_distillation_of_deits_code_is_divided_by_the_classes(logits):
    """Its code takes the mean over all elements: our weight is C times smaller for the same loss."""
    student, teacher, _ = logits
    p_s, p_t = ((z / 3).log_softmax(1) for z in (student, teacher))
    theirs = torch.nn.functional.kl_div(p_s, p_t, reduction='sum', log_target=True) * 9 / p_s.numel()
    assert (kl_div(student, teacher, temperature=3.0) / CLASSES).item() == pytest.approx(theirs.item(), rel=1e-12)


def test_hard_distillation_of_deit(logits):
    """Equation 3."""
    student, teacher, labels = logits
    z_s, z_t, y = student.numpy(), teacher.numpy(), labels.numpy()
    assert (z_t.argmax(1) != y).any()
    paper = ce(psi(z_s), y) / 2 + ce(psi(z_s), z_t.argmax(1)) / 2
    ours = 0.5 * cross_entropy(student, labels) + 0.5 * hard_label(student, teacher)
    assert ours.item() == pytest.approx(paper, rel=1e-12)
