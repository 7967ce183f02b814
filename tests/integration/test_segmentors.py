"""Every kind of mmseg head as student and teacher, through real training runs."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from torch.nn.functional import cross_entropy, interpolate, kl_div

import kd_plugins.mm  # noqa: F401  (registers the readers)
from kd_plugins.errors import DistillError
from kd_plugins.mm.targets import labels
from kd_plugins.predictions import PixelPredictions, find_reader, read
from tests.integration.lab import Probe, distill_hook
from tests.integration.seg_lab import CLASSES, LOGITS, SegLab

FAMILIES = tuple(SegLab.MODELS)
OTHER = dict(zip(FAMILIES, (*FAMILIES[1:], FAMILIES[0]), strict=True))


@TRANSFORMS.register_module()
class BinaryLabels:
    """Everything but the ground is one class."""

    def __call__(self, results):
        labels = results['gt_seg_map']
        labels[(labels > 0) & (labels != 255)] = 1
        return results


@TRANSFORMS.register_module()
class VoidLabels:
    """What is ignored has the number of a class."""

    def __call__(self, results):
        results['gt_seg_map'][results['gt_seg_map'] == 255] = 3
        return results


class Batches(Probe):
    """Also keeps what every iteration's model was given and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def before_train(self, runner) -> None:
        def keep(model, args, kwargs, output):
            if kwargs.get('mode') == 'loss':
                self.seen.append((kwargs['inputs'].clone(), copy.deepcopy(kwargs['data_samples'])))

        runner.model.register_forward_hook(keep, with_kwargs=True)


@pytest.mark.parametrize('family', FAMILIES)
def test_logit_distillation_within_and_across_families(seg_lab, family):
    """Every head learns from its own kind and from another one."""
    config = seg_lab.plain(family)
    for teacher in (family, OTHER[family]):
        probe = Probe()
        terms = dict(logits=LOGITS, cwd={**LOGITS, 'loss': dict(type='ChannelWiseDivLoss')})
        runner = seg_lab.train(seg_lab.hook_form(config, seg_lab.teacher(teacher), terms), probe)
        assert len(probe.logs) == 4
        assert all(log['loss_kd_logits'] > 0 and log['loss_kd_cwd'] > 0 for log in probe.logs)
        assert all(log['kd_ratio'] < 100 for log in probe.logs)
        assert not any('forward' in m.__dict__ for m in runner.model.modules())


@pytest.mark.parametrize('family', FAMILIES)
def test_the_loss_is_that_of_the_tensors_that_the_models_compute(seg_lab, family):
    """The logged value, from the student's and the teacher's own logits and the labels, with torch alone."""
    config = seg_lab.plain(family, optim_wrapper__optimizer__lr=0.0, steps=1)
    # Without dropout and batch statistics a second forward gives the same logits.
    probe = Batches()

    class Freeze(Probe):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            runner.model.eval()

    runner = seg_lab.train(seg_lab.hook_form(config, seg_lab.teacher(family)), probe, Freeze())
    inputs, samples = probe.seen[0]
    teacher = distill_hook(runner).session.teacher.model
    with torch.no_grad():
        student_logits, teacher_logits = runner.model.eval()(inputs), teacher(inputs)
    target = torch.stack([s.gt_sem_seg.data[0] for s in samples])
    size = student_logits.shape[-2:]
    assert student_logits.shape == teacher_logits.shape
    valid = interpolate(target[:, None].double(), size=size, mode='nearest-exact')[:, 0] != 255
    assert 0 < valid.sum() < valid.numel(), 'the batch has padding and ignored pixels'
    log_s, log_t = (x.double().log_softmax(1) for x in (student_logits, teacher_logits))
    pixels = kl_div(log_s, log_t, log_target=True, reduction='none').sum(1)
    assert probe.logs[0]['loss_kd_logits'] == pytest.approx(pixels[valid].mean().item(), rel=1e-4)


@pytest.mark.parametrize('family', ['fcn', 'ocr'])
def test_gradients_reach_every_part_of_the_student_that_predicts(seg_lab, family):
    """With the student's own losses switched off (alpha = 1), only distillation moves weights."""
    gradients = {}

    class Gradients(Probe):
        def before_train(self, runner):
            def keep(optimizer, args, kwargs):
                own = runner.model.named_parameters()
                gradients.update({n: p.grad.abs().sum().item() for n, p in own if p.grad is not None})

            runner.optim_wrapper.optimizer.register_step_pre_hook(keep)

    config = seg_lab.plain(family, steps=1)
    seg_lab.train(seg_lab.hook_form(config, seg_lab.teacher(family), alpha=1.0), Gradients())
    moved = {n for n, g in gradients.items() if g > 0}
    assert any(n.startswith('backbone.') for n in moved)
    head = 'decode_head.' if family == 'fcn' else 'decode_head.1.'
    assert any(n.startswith(head) for n in moved)
    if family == 'fcn':
        assert not any(n.startswith('auxiliary_head.') for n in moved), 'its own loss is switched off'


def test_auxiliary_heads_and_cascade_stages_are_taps(seg_lab):
    probe = Probe()
    terms = dict(
        aux={**LOGITS, 'student': 'auxiliary_head', 'teacher': 'auxiliary_head'},
        mixed={**LOGITS, 'student': 'auxiliary_head', 'teacher': 'decode_head'},
    )
    seg_lab.train(seg_lab.hook_form(seg_lab.plain('pspnet'), seg_lab.teacher('deeplab'), terms), probe)
    inner = {**LOGITS, 'loss': dict(type='ChannelWiseDivLoss'), 'student': 'decode_head.conv_seg'}
    # Its maps are those of the classes, which only the head names.
    with pytest.raises(DistillError, match="is what makes the class logits of 'decode_head'"):
        config = seg_lab.hook_form(seg_lab.plain('pspnet'), seg_lab.teacher('deeplab'), dict(inner=inner))
        seg_lab.train(config, Probe())
    assert all(log[f'loss_kd_{name}'] > 0 for log in probe.logs for name in terms)
    stages = dict(
        first={**LOGITS, 'student': 'decode_head.0', 'teacher': 'decode_head.0'},
        last={**LOGITS, 'student': 'decode_head.1', 'teacher': 'decode_head.1'},
        default=LOGITS,
    )
    probe = Probe()
    runner = seg_lab.train(seg_lab.hook_form(seg_lab.plain('ocr'), seg_lab.teacher('ocr'), stages), probe)
    for log in probe.logs:
        assert log['loss_kd_default'] == log['loss_kd_last'] > 0
        assert 0 < log['loss_kd_first'] != log['loss_kd_last']
    assert distill_hook(runner).session.student_modules == ['decode_head.0', 'decode_head.1']


@pytest.mark.parametrize('family', FAMILIES)
def test_reading_is_what_the_head_itself_predicts(seg_lab, family):
    """The canonical form gives the head's own class probabilities, also in its training form."""
    model = seg_lab.build(seg_lab.plain(family))
    head = model.decode_head[-1] if family == 'ocr' else model.decode_head
    image = torch.randn(2, 3, 64, 64)
    meta = dict(ori_shape=(64, 64), img_shape=(64, 64), pad_shape=(64, 64), padding_size=[0, 0, 0, 0])
    with torch.no_grad():
        model.eval()
        raw = model(image)
        found = read(head, raw, training=False, form=PixelPredictions)
        own = model.encode_decode(image, [meta, meta])
    resized = interpolate(found.logits, size=(64, 64), mode='bilinear', align_corners=False)
    torch.testing.assert_close(resized, own)
    assert found.num_classes == len(CLASSES) and found.activation == 'softmax' and found.ignore_index == 255


def head_of(kind, **options):
    """A stand-alone mmseg head on random features."""
    from mmengine.registry import MODELS

    with MODELS.switch_scope_and_registry('mmseg') as registry:
        return registry.build(dict(type=kind, norm_cfg=dict(type='BN'), num_classes=3, **options))


@pytest.mark.parametrize('training', [False, True])
def test_heads_with_other_training_forms(training):
    """DANet, EncNet, DDRNet, PIDNet and K-Net return tuples or lists; what is read is the map they predict from."""
    maps = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)]
    cases = {
        'DAHead': (dict(in_channels=16, in_index=1, channels=8, pam_channels=4), maps, lambda out: out[0]),
        'EncHead': (dict(in_channels=[8, 16], in_index=(0, 1), channels=8, num_codes=4), maps, lambda out: out[0]),
        'DDRHead': (
            dict(in_channels=8, channels=8, loss_decode=[dict(type='CrossEntropyLoss')] * 2),
            (maps[0][:, :4], maps[0]) if training else maps[0],
            lambda out: out[0] if training else out,
        ),
        'PIDHead': (
            dict(in_channels=8, channels=8, loss_decode=[dict(type='CrossEntropyLoss')] * 4),
            (maps[0][:, :4], maps[0], maps[0][:, :4]) if training else maps[0],
            lambda out: out[1] if training else out,
        ),
    }
    for kind, (options, inputs, expected) in cases.items():
        head = head_of(kind, **options).train(training)
        outputs = head.forward(inputs)
        found = read(head, outputs, training=training, form=PixelPredictions)
        assert found.logits is expected(outputs), kind
        assert found.logits.shape[1] == 3


def test_binary_and_multi_label_heads():
    one = head_of('FCNHead', in_channels=8, channels=8, out_channels=1, in_index=0, num_convs=1)
    # mmseg wants two classes for one output.
    assert read(one, torch.zeros(1, 1, 4, 4), form=PixelPredictions).num_classes == 2
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    many = head_of('FCNHead', in_channels=8, channels=8, in_index=0, num_convs=1, loss_decode=loss)
    assert read(many, torch.zeros(1, 3, 4, 4), form=PixelPredictions).activation == 'sigmoid'


BINARY = """
loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
for part in ('decode_head', 'auxiliary_head'):
    model[part].update(num_classes=2, out_channels=1, threshold=0.5, loss_decode=loss)
for loader in (train_dataloader, val_dataloader):
    loader['dataset']['metainfo'] = dict(classes=('ground', 'shape'))
    loader['dataset']['pipeline'] = [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='BinaryLabels'),
        dict(type='PackSegInputs')]
del part, loader, loss
"""


@pytest.mark.parametrize(
    'teacher_extra', [BINARY, "model['decode_head']['num_classes'] = 2\n"], ids=['binary', 'softmax']
)
def test_a_binary_student_learns_from_binary_and_two_class_teachers(seg_lab, teacher_extra):
    config = seg_lab.plain(extra=BINARY)
    teacher = seg_lab.teacher(extra=teacher_extra)
    probe = Probe()
    seg_lab.train(seg_lab.hook_form(config, {**teacher, 'classes': ('ground', 'shape')}), probe)
    assert all(log['loss_kd_logits'] > 0 for log in probe.logs)


def test_classes_are_matched_by_name_and_pixels_the_teacher_cannot_know_are_left_out(seg_lab):
    """A teacher of three of the four classes, in another order."""
    names = ('bar', 'sky', 'ground', 'circle')
    config = seg_lab.plain(optim_wrapper__optimizer__lr=0.0)

    class Freeze(Probe):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            runner.model.eval()

    probe = Batches()
    teacher = {**seg_lab.teacher(), 'classes': names}
    runner = seg_lab.train(seg_lab.hook_form(config, teacher), probe, Freeze())
    assert distill_hook(runner).session.classes == {'': ([0, 1, 3], [2, 3, 0])}
    squares = 0
    for (inputs, samples), log in zip(probe.seen, probe.logs, strict=True):
        with torch.no_grad():
            ours = runner.model.eval()(inputs)[:, [0, 1, 3]]
            theirs = distill_hook(runner).session.teacher.model(inputs)[:, [2, 3, 0]]
        target = torch.stack([s.gt_sem_seg.data[0] for s in samples])
        small = interpolate(target[:, None].double(), size=ours.shape[-2:], mode='nearest-exact')[:, 0]
        squares += (small == 2).sum()
        valid = (small != 255) & (small != 2)
        pixels = kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction='none').sum(1)
        assert log['loss_kd_logits'] == pytest.approx(pixels[valid].mean().item(), rel=1e-4)
    assert squares, 'the batches show no square'


def test_padding_is_no_image_even_if_it_carries_a_class(seg_lab):
    """seg_pad_val=0 writes the first class into what batching added."""
    config = seg_lab.plain(model__data_preprocessor__seg_pad_val=0)
    probe = Batches()
    seg_lab.train(seg_lab.hook_form(config, seg_lab.teacher()), probe)
    checked = 0
    for inputs, samples in probe.seen:
        found = labels(inputs, samples)
        for image, sample in zip(found, samples, strict=True):
            height, width = sample.metainfo['img_shape']
            raw = sample.gt_sem_seg.data[0]
            assert torch.equal(image[:height, :width], raw[:height, :width])
            outside = torch.cat([image[height:].flatten(), image[:, width:].flatten()])
            assert (outside == 255).all()
            checked += int(len(outside) and (raw[height:] == 0).all())
    assert checked


VOID = """
model['data_preprocessor']['seg_pad_val'] = 3
model['decode_head']['ignore_index'] = model['auxiliary_head']['ignore_index'] = 3
train_dataloader['dataset']['pipeline'] = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='VoidLabels'), dict(type='PackSegInputs')]
"""


def test_the_heads_own_ignore_index_counts(seg_lab):
    """A void class inside the class numbers (as CamVid has) is not distilled either."""
    config = seg_lab.plain(extra=VOID, optim_wrapper__optimizer__lr=0.0, steps=1)
    seen = []

    class Spy(Probe):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            loss = distill_hook(runner).session.terms['logits'].loss
            forward = type(loss).forward

            def spy(student, teacher, target=None):
                seen.append(target)
                return forward(loss, student, teacher, target)

            loss.forward = spy

    seg_lab.train(seg_lab.hook_form(config, seg_lab.teacher()), Spy())
    assert not (seen[0] == 3).any() and (seen[0] == 255).any() and (seen[0] == 1).any()


def test_teacher_of_another_normalisation_and_resolution(seg_lab):
    """The teacher sees the student's pixels, in its own units and at its own size."""
    extra = "model['data_preprocessor'].update(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0], bgr_to_rgb=False)\n"
    teacher = seg_lab.teacher(extra=extra)
    config = seg_lab.plain(steps=1)
    shown = {}

    class Spy(Probe):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            distiller = distill_hook(runner).session
            prepare = distiller.teacher._prepare

            def keep(inputs, samples):
                shown['student'], shown['teacher'] = inputs, prepare(inputs, samples)
                shown['samples'] = samples
                return shown['teacher']

            distiller.teacher._prepare = keep

    for options, size in (({}, None), (dict(input_scale=2.0), 2), (dict(input_size=(96, 128)), (96, 128))):
        probe = Spy()
        runner = seg_lab.train(seg_lab.hook_form(config, {**teacher, **options}), probe)
        assert probe.logs[0]['loss_kd_logits'] > 0
        student, seen = shown['student'], shown['teacher']
        known = runner.model.data_preprocessor
        height, width = shown['samples'][0].metainfo['img_shape']
        pixels = ((student * known.std + known.mean).flip(1) / 255)[0, :, :height, :width]
        if size is None:
            torch.testing.assert_close(seen[0, :, :height, :width], pixels, atol=1e-5, rtol=1e-5)
            continue
        expected = tuple(2 * s for s in student.shape[-2:]) if size == 2 else size
        assert tuple(seen.shape[-2:]) == expected
        assert 'resized' in distill_hook(runner).session.teacher.normalization


TIMM = """
model['backbone'] = dict(
    _delete_=True, type='TIMMBackbone', model_name='resnet10t', features_only=True, pretrained=False, output_stride=8,
    out_indices=(1, 2, 3, 4))
model['decode_head'].update(in_channels=512, in_index=3)
model['auxiliary_head'].update(in_channels=256, in_index=2)
"""


def test_a_teacher_with_a_timm_backbone(seg_lab):
    probe = Probe()
    terms = dict(
        logits=LOGITS,
        features=dict(loss=dict(type='PearsonLoss'), student='backbone[3]', teacher='backbone[3]'),
    )
    seg_lab.train(seg_lab.model_form(seg_lab.plain(), seg_lab.teacher(extra=TIMM), terms), probe)
    assert all(log['loss_kd_logits'] > 0 and log['loss_kd_features'] > 0 for log in probe.logs)


FEATURE_LOSSES = {
    'cwd': dict(loss=dict(type='ChannelWiseDivLoss', temperature=4.0)),
    'pkd': dict(loss=dict(type='PearsonLoss')),
    'mgd': dict(loss=dict(type='MGDLoss', mask_ratio=0.5)),
    'at': dict(loss=dict(type='AttentionTransferLoss')),
    'rkd': dict(loss=dict(type='RelationLoss')),
    'mse': dict(loss=dict(type='FeatureMSELoss'), adapter=dict(type='auto', norm=True)),
}


def test_every_feature_method_on_all_levels_of_the_backbone(seg_lab):
    """Four levels of other widths and a transformer's maps, paired in order; the adapters are trained."""
    terms = {name: dict(student='backbone', teacher='backbone', **term) for name, term in FEATURE_LOSSES.items()}
    probe = Probe()
    plain = seg_lab.plain('segformer', train_dataloader__batch_size=3)
    config = seg_lab.model_form(plain, seg_lab.teacher('upernet'), terms)
    runner = seg_lab.runner(config, probe)
    before = {}

    class Start(Probe):
        priority = 'LOWEST'

        def before_train(self, runner):
            before.update({k: v.clone() for k, v in distill_hook(runner).session.bank.named_parameters()})

    runner.register_hook(Start(), 'LOWEST')
    runner.train()
    bank = distill_hook(runner).session.bank
    for log in probe.logs:
        assert all(log[f'loss_kd_{name}'] > 0 for name in terms), log
    moved = {k.split('.')[0] for k, v in bank.named_parameters() if not torch.equal(v, before[k])}
    assert moved == {'cwd', 'pkd', 'mgd', 'mse'}, 'attention and relations need no adapter'
    assert len(bank.mgd['losses']) == 4
    assert 'running_mean' in ''.join(bank.export_state())


VIT = """
model['backbone'] = dict(
    _delete_=True, type='VisionTransformer', img_size=(64, 64), patch_size=16, embed_dims=48, num_layers=2, num_heads=2,
    mlp_ratio=2, out_indices=(0, 1), with_cls_token=True, final_norm=False)
model['decode_head'].update(in_channels=48, in_index=1)
model['auxiliary_head'].update(in_channels=48, in_index=0)
"""


def test_tokens_of_a_transformer_and_maps_of_a_cnn(seg_lab):
    """Blocks return (B, N, C) tokens with a class token; the other side is a map of another grid."""
    terms = dict(
        block=dict(loss=dict(type='FeatureMSELoss'), student='backbone.layer4', teacher='backbone.layers.1'),
    )
    probe = Probe()
    config = seg_lab.model_form(seg_lab.plain(), seg_lab.teacher(extra=VIT), terms)
    runner = seg_lab.train(config, probe)
    assert all(log['loss_kd_block'] > 0 for log in probe.logs)
    assert sum(p.numel() for p in distill_hook(runner).session.bank.parameters()) == 4 * 8 * 48 + 48


def test_alpha_balances_distillation_and_the_students_own_losses(seg_lab):
    config = seg_lab.plain(steps=1, optim_wrapper__optimizer__lr=0.0)
    logs = {}
    for alpha in (None, 0.75):
        probe = Probe()
        seg_lab.train(seg_lab.hook_form(config, seg_lab.teacher(), alpha=alpha), probe)
        logs[alpha] = probe.logs[0]
    plain, balanced = logs[None], logs[0.75]
    assert balanced['loss_kd_logits'] == pytest.approx(0.75 * plain['loss_kd_logits'], rel=1e-5)
    for key in ('decode.loss_ce', 'aux.loss_ce'):
        assert balanced[key] == pytest.approx(0.25 * plain[key], rel=1e-5)
    assert balanced['decode.acc_seg'] == plain['decode.acc_seg']


def test_alpha_inside_the_loss_is_soft_and_hard(seg_lab):
    """alpha * soft + (1 - alpha) * hard, as the loss alone computes it."""
    config = seg_lab.plain(steps=1, optim_wrapper__optimizer__lr=0.0)

    class Freeze(Probe):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            runner.model.eval()

    logs = {}
    for name, loss in (('soft', {}), ('mixed', dict(alpha=0.25))):
        probe = Batches()
        terms = dict(logits={**LOGITS, 'loss': dict(type='PixelwiseKLDivLoss', **loss)})
        runner = seg_lab.train(seg_lab.hook_form(config, seg_lab.teacher(), terms), probe, Freeze())
        logs[name] = probe.logs[0]['loss_kd_logits']
    inputs, samples = probe.seen[0]
    with torch.no_grad():
        logits = runner.model.eval()(inputs)
    target = torch.stack([s.gt_sem_seg.data[0] for s in samples])
    small = interpolate(target[:, None].double(), size=logits.shape[-2:], mode='nearest-exact')[:, 0].long()
    hard = cross_entropy(logits, small, ignore_index=255)
    assert logs['mixed'] == pytest.approx(0.25 * logs['soft'] + 0.75 * hard.item(), rel=1e-3)


def test_mask_classification_heads_are_refused_before_anything_runs(seg_lab):
    from kd_plugins.mm.configs import load_config, without_pretrained

    config = load_config('mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py')
    with pytest.raises(DistillError, match=r'Mask2FormerHead cannot be read.*set of masks.*UPerHead'):
        find_reader(
            seg_lab.build(Config(dict(model=without_pretrained(config.model), default_scope='mmseg'))).decode_head,
            PixelPredictions,
        )
