"""timm students distilled in MMEngine's Runner: what is computed, for plain ones and for those with a token."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from kd_plugins.classification.sample import ClassSample
from kd_plugins.errors import DistillError
from kd_plugins.mm import TimmClassifier
from kd_plugins.teachers import find_weights, load_checkpoint
from tests.integration.cls_lab import CLASSES, FEATURES, LOGITS, SIZE, TOKEN
from tests.integration.lab import Probe, distill_hook, ema, weights
from tests.integration.promises import difference

#: One small model of every family of timm that has a distillation token.
TOKENS = {
    'deit_tiny_distilled_patch16_224': dict(input_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2),
    'levit_128s': dict(input_size=224),
    'pit_ti_distilled_224': dict(input_size=224),
    'efficientformer_l1': dict(input_size=224, depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32)),
    'efficientformerv2_s0': dict(input_size=224),
    'repvit_m0_9': dict(input_size=64, embed_dim=(8, 16, 24, 32), depth=(1, 1, 1, 1)),
    'swiftformer_xs': dict(input_size=64, layers=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32)),
}


def samples(labels):
    found = []
    for label in labels:
        sample = ClassSample()
        sample.gt_label = torch.as_tensor(label)
        found.append(sample)
    return found


def pixels(count, size=SIZE, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (channels, size, size), dtype=torch.uint8, generator=generator) for _ in range(count)]


# ---------------------------------------------------------------------- the model
@pytest.mark.parametrize('name', TOKENS)
def test_every_family_with_a_token(name):
    """Both heads in training and evaluation; the mean is timm's own prediction, and nothing is left switched."""
    torch.manual_seed(0)
    model = TimmClassifier(name, num_classes=5, **TOKENS[name]).eval()
    plain = model.net
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            if 'head' in key:  # some start with heads that are all but zero
                parameter.add_(torch.randn_like(parameter))
    size = model.data_preprocessor.size
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = plain(images)
        found = model(images, samples([0, 1]), mode='predict')
        assert not plain.training and not any(getattr(m, 'distilled_training', False) for m in plain.modules())
        assert torch.equal(model(images), expected)
        plain.set_distilled_training(True)
        owner = plain.get_submodule(model.token_path)
        owner.training = True
        by_class, by_token = plain(images)
        owner.training = False
        plain.set_distilled_training(False)
    assert (by_class - by_token).abs().max() > 0.1
    for index, sample in enumerate(found):
        torch.testing.assert_close(sample.pred_score, expected[index].softmax(-1))
        torch.testing.assert_close(sample.pred_score_class, by_class[index].softmax(-1))
        torch.testing.assert_close(sample.pred_score_distillation, by_token[index].softmax(-1))


@pytest.mark.parametrize('name', ['resnet18', 'vit_tiny_patch16_224', 'pit_ti_224', 'convnext_atto'])
def test_models_without_a_token_have_one_head(name):
    model = TimmClassifier(name, num_classes=5)
    assert model.token_path is None and not hasattr(model, 'dist_logits')


def test_weights_go_to_timm_and_back(cls_lab, tmp_path):
    """A run's weights, EMA included, are a checkpoint of timm, and timm's own is one to start from."""
    config = cls_lab.plain('deit', default_hooks__checkpoint__published_keys=['state_dict'])
    runner = cls_lab.train(cls_lab.hook_form(config, cls_lab.teacher(), dict(token=TOKEN)))
    path = f'{runner.work_dir}/epoch_1.pth'
    options = {k: v for k, v in config.model.items() if k not in ('type', 'model', 'input_size')}
    net = timm.create_model(config.model.model, img_size=SIZE, **options)
    state = find_weights(load_checkpoint(path), path).state
    net.load_state_dict(state, strict=True)
    assert list(state) == list(net.state_dict())
    # MMEngine's own way to a file of weights alone, which timm opens without trusting what is pickled in it.
    (published,) = Path(runner.work_dir).glob('epoch_1-*.pth')
    loaded = timm.create_model(config.model.model, img_size=SIZE, checkpoint_path=str(published), **options)
    assert difference(net.state_dict(), loaded.state_dict()) == {}
    averaged = ema(runner).module.state_dict()
    assert difference(averaged, loaded.state_dict()) == {}

    file = tmp_path / 'timm.pth'
    torch.save(net.state_dict(), file)
    start = copy.deepcopy(config)
    start.model.checkpoint = str(file)
    model = cls_lab.build(start, seed=5)
    assert difference(net.state_dict(), model.net.state_dict()) == {}
    images = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(model.eval()(images), net.eval()(images))


def test_another_number_of_classes_starts_with_a_new_classifier(cls_lab, tmp_path):
    config = cls_lab.plain('deit')
    donor = cls_lab.build(config, seed=1)
    file = tmp_path / 'donor.pth'
    torch.save(donor.state_dict(), file)
    config.model.checkpoint, config.model.num_classes = str(file), 7
    model = cls_lab.build(config, seed=2)
    own, theirs = model.state_dict(), donor.state_dict()
    changed = {k for k in own if own[k].shape != theirs[k].shape or not torch.equal(own[k], theirs[k])}
    assert changed == {'head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias'}


# ---------------------------------------------------------------------- what is logged
def probe_run(lab, config):
    """Train at learning rate 0 and keep what went into the model; ``(runner, logs, batches)``."""
    probe, batches = Probe(), []

    class Keep(Probe):
        def before_train(self, runner):
            inner = runner.model.data_preprocessor.forward

            def forward(*args, **kwargs):
                batches.append(inner(*args, **kwargs))
                return batches[-1]

            runner.model.data_preprocessor.forward = forward

    config.optim_wrapper.optimizer.lr = 0.0
    return lab.train(config, probe, Keep()), probe.logs, batches


def both_heads(model, images):
    """Logits of the class head and of the token's head, with nothing of ours."""
    net = model.net.train()
    net.set_distilled_training(True)
    try:
        return net(images)
    finally:
        net.set_distilled_training(False)


@pytest.mark.parametrize('kind', ['hard', 'soft'])
def test_the_token_learns_from_the_teacher_and_the_class_head_from_labels(cls_lab, kind):
    """DeiT's equations, computed with torch alone from both models' outputs, half and half."""
    loss = dict(type='HardLabelLoss') if kind == 'hard' else dict(type='KLDivLoss', temperature=3.0)
    config = cls_lab.hook_form(cls_lab.plain('deit'), cls_lab.teacher(), dict(token={**TOKEN, 'loss': loss}), alpha=0.5)
    runner, logs, batches = probe_run(cls_lab, config)
    teacher = distill_hook(runner).session.teacher.model
    assert len(logs) == 4
    for log, batch in zip(logs, batches, strict=True):
        images, labels = batch['inputs'], torch.stack([s.gt_label for s in batch['data_samples']])
        with torch.no_grad():
            by_class, by_token = both_heads(runner.model, images)
            taught = teacher.net(images)
        if kind == 'hard':
            kd = cross_entropy(by_token, taught.argmax(1))
        else:
            kd = 9 * kl_div(
                log_softmax(by_token / 3, 1), log_softmax(taught / 3, 1), log_target=True, reduction='batchmean'
            )
        own = 0.5 * cross_entropy(by_class, labels).item()
        assert log['loss_cls'] == pytest.approx(own, rel=1e-4)
        assert log['loss_kd_token'] == pytest.approx(0.5 * kd.item(), rel=1e-4)
        assert log['loss'] == pytest.approx(own + 0.5 * kd.item(), rel=1e-4)


def test_without_a_taught_token_the_labels_teach_the_mean_of_both_heads(cls_lab):
    """As timm trains such a model; also while the term is off, and when only the prediction is taught."""
    terms = dict(token=TOKEN)
    for options in (dict(start=1), {}):
        config = cls_lab.plain('deit', train_cfg__max_epochs=2)
        if not options:
            terms = dict(logits=LOGITS)
        config = cls_lab.hook_form(config, cls_lab.teacher(), terms, **options)
        runner, logs, batches = probe_run(cls_lab, config)
        for step, (log, batch) in enumerate(zip(logs, batches, strict=True)):
            labels = torch.stack([s.gt_label for s in batch['data_samples']])
            with torch.no_grad():
                by_class, by_token = both_heads(runner.model, batch['inputs'])
            apart = bool(options) and step >= 4
            expected = cross_entropy(by_class if apart else (by_class + by_token) / 2, labels)
            assert log['loss_cls'] == pytest.approx(expected.item(), rel=1e-4), (options, step)


def test_a_token_taught_with_weight_zero_is_the_plain_run(cls_lab):
    config = cls_lab.plain('deit')
    plain = cls_lab.train(config)
    other = cls_lab.train(cls_lab.hook_form(config, cls_lab.teacher(), dict(token={**TOKEN, 'weight': 0.0})))
    assert difference(weights(plain), weights(other)) == {}


def test_each_head_alone_is_measured(cls_lab):
    config = cls_lab.plain('deit', val=True, train_cfg__val_interval=1)
    runner = cls_lab.train(config)
    scalars = runner.message_hub.log_scalars
    assert {'val/accuracy/top1', 'val/accuracy/top1_class_head', 'val/accuracy/top1_distillation_head'} <= set(scalars)
    plain = cls_lab.train(cls_lab.plain('resnet', val=True, train_cfg__val_interval=1))
    assert 'val/accuracy/top1' in plain.message_hub.log_scalars
    assert not [k for k in plain.message_hub.log_scalars if 'head' in k]


@pytest.mark.parametrize('mixup', [None, dict(mixup_alpha=0.8, cutmix_alpha=1.0)])
@pytest.mark.parametrize(
    'loss',
    [
        dict(type='KLDivLoss', temperature=4.0),
        dict(type='KLDivLoss', temperature=2.0, standardize=True),
        dict(type='DKDLoss', beta=2.0),
        dict(type='DISTLoss'),
        dict(type='OFALoss'),
        dict(type='HardLabelLoss'),
    ],
    ids=lambda v: v['type'] + str(v.get('standardize', '')),
)
def test_the_teacher_sees_the_mixed_images(cls_lab, loss, mixup):
    """Logged values are those of the loss on both models' outputs for the very batch the student had."""
    import kd_plugins.losses as losses

    config = cls_lab.hook_form(
        cls_lab.plain('convnext', model__mixup=mixup, model__label_smoothing=0.1),
        cls_lab.teacher('vit'),
        dict(logits={**LOGITS, 'loss': loss}),
    )
    config.model.drop_path_rate = 0.0
    runner, logs, batches = probe_run(cls_lab, config)
    teacher = distill_hook(runner).session.teacher.model
    function = getattr(losses, loss['type'])(**{k: v for k, v in loss.items() if k != 'type'})
    student, known = runner.model.data_preprocessor, teacher.data_preprocessor
    for log, batch in zip(logs, batches, strict=True):
        images = batch['inputs']
        target = torch.stack([s.gt_score if mixup else s.gt_label for s in batch['data_samples']])
        shown = (images * student.std + student.mean - known.mean) / known.std
        with torch.no_grad():
            pair = runner.model.net(images), teacher.net(shown)
            value = function(*pair, target) if getattr(function, 'needs_target', False) else function(*pair)
        assert log['loss_kd_logits'] == pytest.approx(value.item(), rel=2e-4, abs=1e-6)
        if mixup:
            assert target.shape == (len(images), 4) and torch.allclose(target.sum(1), torch.ones(len(images)))


# ---------------------------------------------------------------------- classes by name
def test_classes_are_matched_by_name_and_unknown_images_left_out(cls_lab):
    """The teacher knows three of the four classes, in another order, and one more."""
    names = ('square', 'bar', 'star', 'circle', 'moon')
    teacher = {**cls_lab.teacher(classes=5), 'classes': names}
    config = cls_lab.hook_form(
        cls_lab.plain('convnext', train_dataloader__batch_size=16),
        teacher,
        dict(kl=LOGITS, dkd={**LOGITS, 'loss': dict(type='DKDLoss')}),
    )
    config.model.drop_path_rate = 0.0
    runner, logs, batches = probe_run(cls_lab, config)
    distiller = distill_hook(runner).session
    assert distiller.classes == {'': ([0, 1, 3], [1, 3, 0])}
    import kd_plugins.losses as losses

    for log, batch in zip(logs, batches, strict=True):
        labels = torch.stack([s.gt_label for s in batch['data_samples']])
        keep = labels != CLASSES.index('cross')
        assert 0 < keep.sum() < len(keep)
        with torch.no_grad():
            ours = runner.model.net(batch['inputs'])[keep][:, [0, 1, 3]]
            theirs = distiller.teacher.model.net(batch['inputs'])[keep][:, [1, 3, 0]]
        mapped = torch.tensor([0, 1, -1, 2])[labels[keep]]
        assert log['loss_kd_kl'] == pytest.approx(losses.kl_div(ours, theirs).item(), rel=1e-4)
        assert log['loss_kd_dkd'] == pytest.approx(losses.dkd(ours, theirs, mapped).item(), rel=1e-4)


def test_a_batch_without_known_classes_teaches_nothing(cls_lab):
    names = ('cross', 'bar', 'star', 'moon', 'sun')
    teacher = {**cls_lab.teacher(classes=5), 'classes': names}
    config = cls_lab.hook_form(cls_lab.plain(train_dataloader__batch_size=1), teacher)
    _, logs, batches = probe_run(cls_lab, config)
    labels = [batch['data_samples'][0].gt_label.item() for batch in batches]
    assert [log['loss_kd_logits'] > 0 for log in logs] == [label in (0, 2) for label in labels]
    assert len(set(labels)) == 4


# ---------------------------------------------------------------------- teachers and students that differ
@pytest.mark.parametrize('size', [24, 48])
def test_a_teacher_of_another_resolution(cls_lab, size):
    """The batch is resized to what the teacher's config says; nothing has to be written."""
    extra = f"model['input_size'] = {size}\nmodel['patch_size'] = 8\n"
    teacher = cls_lab.teacher('vit', extra=extra)
    runner, logs, batches = probe_run(cls_lab, cls_lab.hook_form(cls_lab.plain(), teacher))
    seen = []
    model = distill_hook(runner).session.teacher
    model.model.net.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    model.outputs(batches[0]['inputs'], None, ['logits'])
    assert seen == [(size, size)]
    assert all(log['loss_kd_logits'] > 0 for log in logs)


@pytest.mark.parametrize(
    ('student', 'teacher', 'taps'),
    [
        ('resnet', 'vit', dict(student='stages[-1]', teacher='stages[-1]')),
        ('resnet', 'vit', dict(student='net.layer3', teacher='net.blocks.3')),
        ('deit', 'resnet', dict(student='stages[-2]', teacher='stages[-2]')),
        ('convnext', 'deit', dict(student='stages[-1]', teacher='net.blocks.3')),
    ],
)
def test_features_across_architectures(cls_lab, student, teacher, taps):
    terms = dict(
        mse=dict(loss=dict(type='FeatureMSELoss'), **taps), at=dict(loss=dict(type='AttentionTransferLoss'), **taps)
    )
    probe = Probe()
    cls_lab.train(cls_lab.model_form(cls_lab.plain(student), cls_lab.teacher(teacher), terms), probe)
    assert all(log['loss_kd_mse'] > 0 and log['loss_kd_at'] > 0 for log in probe.logs)


def test_attention_of_a_vit_teaches_a_cnn(cls_lab):
    """Though timm's fused attention never computes the maps that are compared."""
    term = dict(loss=dict(type='AttentionTransferLoss'), student='net.layer3', teacher='net.blocks.3.attn.attn_drop')
    probe = Probe()
    runner = cls_lab.train(cls_lab.hook_form(cls_lab.plain(), cls_lab.teacher('vit'), dict(attention=term)), probe)
    assert all(log['loss_kd_attention'] > 0 for log in probe.logs)
    teacher = distill_hook(runner).session.teacher.model
    assert teacher.net.blocks[3].attn.fused_attn


def test_a_projector_into_the_space_of_the_logits(cls_lab):
    term = dict(loss=dict(type='OFALoss'), student='stages[-2]', teacher='logits', adapter=dict(type='LogitProjector'))
    probe = Probe()
    runner = cls_lab.train(cls_lab.model_form(cls_lab.plain(), cls_lab.teacher('vit'), dict(ofa=term)), probe)
    assert all(log['loss_kd_ofa'] > 0 for log in probe.logs)
    assert distill_hook(runner).session.trainable


# ---------------------------------------------------------------------- options of the model
def test_frozen_parts_stay_as_they_are(cls_lab):
    """Weights and statistics; the rest learns. The first stage of a distillation in two."""
    config = cls_lab.plain(model__freeze=['classifier', 'bn1'])
    start = cls_lab.runner(config).model.state_dict()
    start = {k: v.clone() for k, v in start.items()}
    runner = cls_lab.train(cls_lab.model_form(config, cls_lab.teacher(), dict(f=FEATURES)))
    changed = set(difference(start, runner.model.state_dict()))
    assert not {k for k in changed if k.startswith(('fc.', 'bn1.'))}
    assert {'conv1.weight', 'layer4.0.bn1.running_mean'} <= changed


def test_multi_label_students(cls_lab):
    """Independent classes: binary cross-entropy, and a binary KL from the teacher."""
    rng = np.random.default_rng(0)
    folder = cls_lab.root / 'multi'
    folder.mkdir(exist_ok=True)
    np.save(folder / 'images.npy', rng.integers(0, 256, (16, SIZE, SIZE, 3), dtype=np.uint8))
    np.save(folder / 'labels.npy', rng.integers(0, 2, (16, 4)))
    data = dict(type='kd_plugins.ArrayDataset', images=str(folder / 'images.npy'), labels=str(folder / 'labels.npy'))
    config = cls_lab.plain('resnet', val=True, model__multi_label=True, train_cfg__val_interval=1)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset = dict(data, classes=CLASSES)
    config.val_evaluator = config.test_evaluator = dict(type='kd_plugins.MultiLabelAP')
    terms = dict(logits={**LOGITS, 'loss': dict(type='BinaryKLDivLoss')})
    runner, logs, batches = probe_run(cls_lab, cls_lab.hook_form(config, cls_lab.teacher('convnext'), terms))
    assert 'val/multi_label/mAP' in runner.message_hub.log_scalars
    labels = torch.stack([s.gt_label for s in batches[0]['data_samples']])
    assert labels.shape == (4, 4)
    assert all(log['loss_kd_logits'] > 0 for log in logs)
    with pytest.raises(
        DistillError, match=r"KLDivLoss does not suit .* a sigmoid each; write loss=dict\(type='BinaryKL"
    ):
        cls_lab.train(cls_lab.hook_form(config, cls_lab.teacher('convnext')))


def test_grey_images(cls_lab):
    config = cls_lab.plain('resnet', val=True, model__in_chans=1, train_cfg__val_interval=1)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.in_chans = 1
    probe = Probe()
    teacher = cls_lab.teacher('resnet', extra="model['in_chans'] = 1\n")
    runner = cls_lab.train(cls_lab.hook_form(config, teacher), probe)
    assert runner.model.net.conv1.weight.shape[1] == 1 and len(runner.model.data_preprocessor.mean) == 1
    assert all(log['loss_kd_logits'] > 0 for log in probe.logs)


def test_a_batch_of_odd_size_mixes_all_but_its_last_image():
    model = TimmClassifier('resnet18', num_classes=4, input_size=32, mixup=dict(mixup_alpha=1.0), label_smoothing=0.2)
    np.random.seed(0)
    batch = model.data_preprocessor(dict(inputs=pixels(5), data_samples=samples([0, 1, 2, 3, 0])), training=True)
    plain = model.data_preprocessor(dict(inputs=pixels(5), data_samples=samples([0, 1, 2, 3, 0])), training=False)
    same = [torch.equal(a, b) for a, b in zip(batch['inputs'], plain['inputs'], strict=True)]
    assert same == [False] * 4 + [True]
    assert batch['data_samples'][4].gt_score.tolist() == pytest.approx([0.85, 0.05, 0.05, 0.05])
    assert 'gt_score' not in plain['data_samples'][0]
    alone = model.data_preprocessor(dict(inputs=pixels(1), data_samples=samples([2])), training=True)
    assert torch.equal(alone['inputs'], plain['inputs'][:1])


def test_pixels_are_normalised_as_timm_does():
    model = TimmClassifier('vit_tiny_patch16_224', num_classes=4, input_size=32)
    data = timm.data.resolve_data_config({}, model=model.net)
    (image,) = pixels(1)
    batch = model.data_preprocessor(dict(inputs=[image], data_samples=None))
    mean, std = (torch.tensor(data[k]).view(3, 1, 1) for k in ('mean', 'std'))
    torch.testing.assert_close(batch['inputs'][0], (image / 255 - mean) / std)


def test_losses_are_timms_own():
    def criterion(**options):
        return TimmClassifier('resnet18', num_classes=4, input_size=32, **options).criterion

    mixup = dict(mixup_alpha=0.8)
    assert type(criterion()) is nn.CrossEntropyLoss
    smooth = criterion(label_smoothing=0.1)
    assert type(smooth) is timm.loss.LabelSmoothingCrossEntropy and smooth.smoothing == 0.1
    assert type(criterion(mixup=mixup, label_smoothing=0.1)) is timm.loss.SoftTargetCrossEntropy
    binary = criterion(loss='bce', label_smoothing=0.1)
    assert type(binary) is timm.loss.BinaryCrossEntropy and binary.smoothing == 0.1
    assert criterion(loss=dict(type='PolyCrossEntropy', epsilon=2.0)).epsilon == 2
    assert type(criterion(multi_label=True)) is timm.loss.BinaryCrossEntropy


def test_a_projector_compares_the_classes_that_both_know(cls_lab):
    names = ('square', 'bar', 'star', 'circle', 'moon')
    teacher = {**cls_lab.teacher('vit', classes=5), 'classes': names}
    term = dict(
        loss=dict(type='KLDivLoss'), student='stages[-1]', teacher='logits', adapter=dict(type='LogitProjector')
    )
    config = cls_lab.plain(train_dataloader__batch_size=1)
    runner, logs, batches = probe_run(cls_lab, cls_lab.model_form(config, teacher, dict(branch=term)))
    distiller = distill_hook(runner).session
    assert distiller.classes == {'': ([0, 1, 3], [1, 3, 0])}
    labels = [batch['data_samples'][0].gt_label.item() for batch in batches]
    assert [log['loss_kd_branch'] > 0 for log in logs] == [label != 2 for label in labels]
    assert set(labels) == {0, 1, 2, 3}
