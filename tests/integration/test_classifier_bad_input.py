"""Wrong input around classifiers is refused before anything is trained, in words that say what to write instead."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook

from kd_plugins.cli import main
from kd_plugins.errors import DistillError
from tests.integration.cls_lab import CLASSES, SIZE, ClsLab
from tests.integration.lab import Probe

#: What makes timm's own ResNet-18 the lab's.
RESNET = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), output_stride=8)


class OddLab(ClsLab):
    """Also folders of images with something wrong in them."""

    def images(self, name, damage):
        """A copy of the data set, damaged by ``damage(folder)``."""
        folder = self.root / 'odd' / name
        if not folder.exists():
            shutil.copytree(self.root / 'images', folder)
            damage(folder)
        return str(folder)

    def arrays(self, labels=None, **options):
        """A data set of arrays in files; by default an image has any number of labels."""
        rng = np.random.default_rng(0)
        folder = self.root / 'arrays' / str(next(self._numbers))
        folder.mkdir(parents=True)
        labels = rng.integers(0, 2, (8, 4)) if labels is None else np.array(labels)
        np.save(folder / 'labels.npy', labels)
        np.save(folder / 'images.npy', rng.integers(0, 256, (8, SIZE, SIZE, 3), dtype=np.uint8))
        images, labels = (str(folder / f'{name}.npy') for name in ('images', 'labels'))
        return dict(type='kd_plugins.ArrayDataset', images=images, labels=labels, **options)


# ---------------------------------------------------------------------- what a case is made of
def term(loss='KLDivLoss', student='logits', teacher='logits', *, options=None, **more):
    return dict(loss=dict(type=loss, **(options or {})), student=student, teacher=teacher, **more)


def features(student='stages[-1]', teacher='stages[-1]', loss='FeatureMSELoss', **more):
    return term(loss, student, teacher, **more)


@dataclass(frozen=True)
class Case:
    """A student's family and options, its teacher, a term, and the words that the error must contain."""

    name: str
    term: dict
    says: tuple
    student: str = 'resnet'
    plain: tuple = ()  # more options of `ClsLab.plain`
    teacher: Any = ('resnet', ())  # family and more options of `ClsLab.teacher`, or a function of the lab
    changes: tuple = ()  # of the mapping `teacher`
    distill: tuple = ()  # more options of `distill`
    form: str = 'hook_form'
    edit: Any = None  # edit(lab, config) of the whole config

    def config(self, lab):
        teacher = self.teacher(lab) if callable(self.teacher) else lab.teacher(self.teacher[0], **dict(self.teacher[1]))
        plain = lab.plain(self.student, **dict(self.plain))
        config = getattr(lab, self.form)(
            plain, {**teacher, **dict(self.changes)}, dict(cls=self.term), **dict(self.distill)
        )
        if self.edit is not None:
            self.edit(lab, config)
        return config


def case(name, value, *says, **more):
    more = {k: tuple(v.items()) if isinstance(v, dict) else v for k, v in more.items()}
    return Case(name, value, says, **more)


def model(**options):
    return {f'model__{k}': v for k, v in options.items()}


def data(**options):
    return {f'train_dataloader__dataset__{k}': v for k, v in options.items()}


def of(family, **more):
    return family, tuple(more.items())


def timm(name='resnet18', *, options=RESNET, **more):
    """A teacher given by its name, with the weights of the lab's usual one."""
    return lambda lab: dict(
        timm=name, checkpoint=lab.teacher()['checkpoint'], num_classes=4, input_size=SIZE, options=options, **more
    )


def checkpoint_of(family, **more):
    """The config of the usual teacher with the weights of another."""
    return lambda lab: {**lab.teacher(), 'checkpoint': lab.teacher(family, **more)['checkpoint']}


def file(name, content, key='checkpoint', base=ClsLab.teacher):
    """A teacher one of whose files is made by ``content(path, lab)``."""

    def build(lab):
        path = lab.root / name
        content(path, lab)
        return {**(base(lab) if base else {}), key: str(path)}

    return build


def half(path, lab):
    content = Path(lab.teacher()['checkpoint']).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def pickled(path, lab):
    torch.save(torch.nn.Conv2d(3, 4, 1), path)


def ultralytics(kind):
    """The file of a network of Ultralytics with this data set's classes."""

    def build(path, lab):
        from ultralytics import YOLO
        from ultralytics.nn.tasks import yaml_model_load
        from ultralytics.utils import YAML

        written = path.with_suffix('.yaml')
        YAML.save(written, {**yaml_model_load(f'{kind}.yaml'), 'nc': len(CLASSES)})
        model = YOLO(str(written))
        model.model.names = dict(enumerate(CLASSES))
        model.save(path)

    return build


def detector(lab):
    from tests.integration.synthetic import save_teacher, yolox

    folder = lab.root / 'detector'
    folder.mkdir(exist_ok=True)
    return save_teacher(yolox(3), folder)


def starts_from(path):
    def build(lab, config):
        file = lab.root / 'start.pth'
        path(file, lab)
        config.model.checkpoint = str(file)

    return build


def weights_of(family, **more):
    return lambda path, lab: shutil.copy(lab.teacher(family, **more)['checkpoint'], path)


def in_images(name, damage):
    """Train on a damaged copy of the images."""

    def edit(lab, config):
        config.train_dataloader.dataset.root = lab.images(name, damage)

    return edit


def truncate(folder):
    for path in folder.glob('train/*/*.png'):
        path.write_bytes(path.read_bytes()[:200])


def text_files(folder):
    for path in folder.glob('train/*/*.png'):
        path.write_text('a, b, c')


def no_images(folder):
    for path in folder.glob('train/*/*.png'):
        path.unlink()


def other_folder(folder):
    (folder / 'train' / 'circles').mkdir()


def arrays(**options):
    def edit(lab, config):
        config.train_dataloader.dataset = lab.arrays(**options)

    return edit


def transform(**options):
    def edit(lab, config):
        config.train_dataloader.dataset.transform = options

    return edit


MIX = dict(mixup_alpha=0.8)
CASES = [
    # --- classes
    case(
        'too few classes',
        term(),
        'data set has 4 classes',
        'num_classes=3',
        'write num_classes=4',
        plain=model(num_classes=3),
    ),
    case(
        'too many classes',
        term(),
        'data set has 4 classes',
        'num_classes=7',
        'write num_classes=4',
        plain=model(num_classes=7),
    ),
    case(
        'too few classes for features',
        features(),
        'data set has 4 classes',
        'write num_classes=4',
        plain=model(num_classes=3),
        teacher=of('resnet', width=8),
    ),
    case('classes of ImageNet', term(), 'num_classes=1000', 'write num_classes=4', plain=model(num_classes=None)),
    case(
        'counts differ, names unknown',
        term(),
        'student has 4 classes and the teacher 7',
        'classes=[...] with the names',
        teacher=lambda lab: {**timm()(lab), 'checkpoint': lab.teacher(classes=7)['checkpoint'], 'num_classes': 7},
    ),
    case(
        'no class in common',
        term(),
        'no class in common',
        "'bar', 'circle'",
        "'class0', 'class1'",
        'classes=[...] with the names',
        teacher=of('resnet', classes=5),
    ),
    case(
        'numbers for names',
        term(),
        'no class in common',
        "'0', '1'",
        "'bar', 'circle'",
        'classes=[...] with the names',
        edit=arrays(labels=[0, 1, 2, 3] * 2),
    ),
    case(
        'names for another head',
        term(),
        'teacher.classes has 2 names',
        'predicts 4 classes',
        changes=dict(classes=('bar', 'cross')),
    ),
    case('classes is a text', term(), 'teacher.classes must be a list of names', "'bar'", changes=dict(classes='bar')),
    case(
        'num_classes of a config',
        term(),
        "no option 'num_classes'",
        "did you mean 'classes'",
        changes=dict(num_classes=4),
    ),
    case(
        'wrong num_classes of a timm teacher',
        term(),
        'does not fit',
        'fc.weight is (4, 128) in the file and (10, 128)',
        'number of classes',
        teacher=timm(),
        changes=dict(num_classes=10),
    ),
    case(
        'num_classes is a text',
        term(),
        "num_classes must be a whole number >= 1, got '10'",
        plain=model(num_classes='10'),
    ),
    case(
        'less than a batch',
        term(),
        'not one batch of its',
        '16 images',
        'batch_size=32',
        'drop_last=True',
        plain=dict(train_dataloader__batch_size=32, train_dataloader__drop_last=True),
    ),
    case(
        'more ranks than classes',
        term(),
        'top 5 of 4 classes',
        'topk=(1,)',
        plain=dict(val=True, val_evaluator__topk=(1, 5)),
    ),
    # --- the images' size
    case(
        'images too large for a ViT',
        term(),
        '.png',
        'is 32x32 but the model takes 16x16',
        'write input_size=16',
        student='vit',
        plain=model(input_size=16),
    ),
    case(
        'images too small for a CNN',
        term(),
        '.png',
        'is 32x32 but the model takes 64x64',
        'write input_size=64',
        plain=model(input_size=64),
    ),
    case(
        'no patches',
        term(),
        'images of 30x30 do not divide into the 8x8 patches',
        'input_size of 32x32',
        student='vit',
        plain=model(input_size=30),
    ),
    case(
        'input_size is a text',
        term(),
        'input_size must be a whole number',
        "'32'",
        student='vit',
        plain=model(input_size='32'),
    ),
    case(
        'too small for its strides',
        term(),
        'student',
        '4x4 pixels',
        '(2 x 2)',
        student='convnext',
        plain={**model(input_size=4, patch_size=4), **data(transform=[dict(type='Resize', size=4)])},
    ),
    case(
        'no patches of Swin',
        term(),
        '33x33',
        '4x4 patches',
        'input_size of 32x32',
        student='vit',
        plain=model(
            model='swin_tiny_patch4_window7_224',
            patch_size=4,
            embed_dim=8,
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 1, 1),
            input_size=33,
            depth=None,
        ),
    ),
    case(
        "teacher's input_size of a fixed ViT",
        term(),
        'teacher',
        '64',
        'model (32)',
        'teacher.input_size',
        teacher=of('vit'),
        changes=dict(input_size=64),
    ),
    case("teacher's input_size 0", term(), 'teacher.input_size', '(0, 5)', changes=dict(input_size=(0, 5))),
    # --- taps
    case(
        'no token',
        term('HardLabelLoss', student='dist_logits'),
        "student 'dist_logits'",
        'resnet18 has no distillation token',
        "write student='logits'",
        'deit_tiny_distilled',
    ),
    case(
        'a token that the teacher lacks',
        term('HardLabelLoss', 'dist_logits', 'dist_logits'),
        "teacher 'dist_logits'",
        "write teacher='logits'",
        student='deit',
    ),
    case("the teacher's fc", term(teacher='net.fc'), "teacher 'net.fc'", "write 'logits'"),
    case('criterion', features('criterion'), "student 'criterion'", "the taps of a classifier are 'logits'"),
    case('net forgotten, misspelt', features('layer5'), "'layer5'", "did you mean 'net.layer4'"),
    case(
        'smoothing beside a loss',
        term(),
        'model.label_smoothing=0.1',
        'write it in that dict',
        plain=model(loss=dict(type='CrossEntropyLoss'), label_smoothing=0.1),
    ),
    case(
        'timm means',
        term(),
        'model.std',
        '(0.229, 0.224, 0.225)',
        'multiplied by 255',
        plain=model(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ),
    case(
        'pixel means of a teacher',
        term(),
        'teacher.mean',
        '[0, 1]',
        '123.675',
        teacher=timm(),
        changes=dict(mean=(123.675, 116.28, 103.53)),
    ),
    case('mean forgotten', term(), 'model.std must be 3 number(s)', '(58, 57)', plain=model(std=(58, 57))),
    case(
        "the token's module",
        term('HardLabelLoss', 'net.head_dist'),
        "student 'net.head_dist'",
        "write 'dist_logits'",
        student='deit',
    ),
    case("the classifier's module", term('KLDivLoss', 'net.fc', 'net.fc'), "student 'net.fc'", "write 'logits'"),
    case(
        'stages out of range',
        features('stages[7]'),
        "student 'stages[7]'",
        'resnet18 has 5 stages',
        'stages[-1] (the last) to stages[-5]',
    ),
    case('stages without index', features('stages'), "student 'stages'", '5 stages', 'write stages[-1]'),
    case('stages by name', features('stages.0'), "student 'stages.0'", "'stages[-1]'"),
    case(
        'a list of blocks',
        features('net.blocks[1]'),
        "'net.blocks[1]'",
        '4 layers one after the other',
        "write 'net.blocks.1'",
        student='vit',
    ),
    case('misspelt stages', features('stage[-1]'), "student 'stage[-1]'", "'stages[-1]'"),
    case(
        'bbox_head',
        term(student='bbox_head', teacher='bbox_head'),
        "student 'bbox_head'",
        "the taps of a classifier are 'logits'",
    ),
    case(
        'backbone.layer4',
        features('backbone.layer4', 'backbone.layer4'),
        "'backbone.layer4'",
        "did you mean 'net.layer4'",
    ),
    case('net forgotten', features('layer4', 'layer4'), "student 'layer4'", "did you mean 'net.layer4'"),
    case(
        'net forgotten, deep',
        features('blocks.3.mlp', 'net.layer4'),
        "'blocks.3.mlp'",
        "did you mean 'net.blocks.3.mlp'",
        student='vit',
    ),
    case('misspelt layer', features('net.layer5'), "no module 'net.layer5'", "did you mean 'net.layer4'"),
    case('logits[0]', term(student='logits[0]'), "student 'logits[0]'", "write 'logits'"),
    case(
        'logits and features',
        features('stages[-1]', 'logits'),
        "teacher 'logits'",
        '(1, 4)',
        'before the pooling',
        form='model_form',
    ),
    case(
        'features and logits',
        term(student='stages[-1]'),
        "'stages[-1]' has the map 32x4x4",
        'not the classes',
        form='model_form',
    ),
    case(
        'a frozen tap',
        features('net.layer1', 'net.layer1'),
        "'net.layer1' carries no gradient",
        'tap a trainable module',
        plain=model(freeze=['conv1', 'bn1', 'layer1']),
    ),
    case(
        'attention of a CNN',
        features('net.layer4.attn_drop', loss='AttentionTransferLoss'),
        "no module 'net.layer4.attn_drop'",
        "net.layer4 has the children '0'",
    ),
    # --- the student's model
    case(
        'unknown student',
        term(),
        "timm has no model 'resnet19'",
        "did you mean 'resnet18'",
        plain=model(model='resnet19'),
    ),
    case(
        'student of torchvision',
        term(),
        "no model 'efficientnet_v2_s'",
        "'efficientnetv2_s'",
        plain=model(model='efficientnet_v2_s', layers=None, channels=None, output_stride=None),
    ),
    case(
        'unknown tag',
        term(),
        "no weights 'resnet18.a1_in22k'",
        "'resnet18.a1_in1k'",
        plain=model(model='resnet18.a1_in22k'),
    ),
    case(
        'misspelt option',
        term(),
        "'resnet18' has no option 'drop_path_rat'",
        "did you mean 'drop_path_rate'",
        plain=model(drop_path_rat=0.1),
    ),
    case(
        'misspelt option of ours',
        term(),
        "no option 'label_smoothin'",
        "did you mean 'label_smoothing'",
        plain=model(label_smoothin=0.1),
    ),
    case(
        'option of another model',
        term(),
        "'resnet18' has no option 'embed_dim'",
        'choose from',
        plain=model(embed_dim=8),
    ),
    case('option of a wrong type', term(), 'student', "'much'", plain=model(drop_rate='much')),
    case('img_size', term(), "no option 'img_size'", "did you mean 'input_size'", plain=model(img_size=32)),
    case(
        'label_smoothing 1.5',
        term(),
        'model.label_smoothing must be a number in [0, 1), got 1.5',
        plain=model(label_smoothing=1.5),
    ),
    case(
        'multi_label is a text',
        term(),
        'model.multi_label must be True or False',
        "'yes'",
        plain=model(multi_label='yes'),
    ),
    case('in_chans 4', term(), 'has 3 channels', 'takes 4', plain=model(in_chans=4)),
    case('mean of four', term(), 'model.mean must be 3 number(s)', '(1, 2, 3, 4)', plain=model(mean=(1, 2, 3, 4))),
    case('std 0', term(), 'model.std', 'at least 1', '(0, 1, 1)', plain=model(std=(0, 1, 1))),
    case(
        'freeze unknown',
        term(),
        "freeze: ResNet has no module 'layer9'",
        "did you mean 'layer4'",
        plain=model(freeze=['layer9']),
    ),
    case(
        'freeze everything',
        term(),
        "'layer4', 'fc'] leaves nothing to train",
        plain=model(freeze=['conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4', 'fc']),
    ),
    case('freeze a number', term(), 'model.freeze must be a list of modules', 'got 2', plain=model(freeze=2)),
    # --- losses of the student
    case('unknown loss', term(), "model.loss must be 'ce', 'bce' or dict(type=...)", "'bec'", plain=model(loss='bec')),
    case(
        'unknown type of loss',
        term(),
        "no loss 'CrossEntropLoss'",
        "did you mean 'CrossEntropyLoss'",
        plain=model(loss=dict(type='CrossEntropLoss')),
    ),
    case(
        'a KD loss as loss',
        term(),
        'model.loss KLDivLoss',
        'class numbers (B,)',
        'leave loss out',
        plain=model(loss=dict(type='KLDivLoss')),
    ),
    case(
        'unknown option of a loss',
        term(),
        "(LabelSmoothingCrossEntropy) has no option 'smooth'",
        "did you mean 'smoothing'",
        plain=model(loss=dict(type='LabelSmoothingCrossEntropy', smooth=0.1)),
    ),
    case(
        'wrong value of a loss',
        term(),
        'LabelSmoothingCrossEntropy(smoothing=2.0) is refused',
        plain=model(loss=dict(type='LabelSmoothingCrossEntropy', smoothing=2.0)),
    ),
    case(
        'hard loss and mixup',
        term(),
        'LabelSmoothingCrossEntropy takes class numbers',
        'mixup makes soft labels',
        'label_smoothing in the model',
        plain=model(loss=dict(type='LabelSmoothingCrossEntropy'), mixup=MIX),
    ),
    case(
        'soft loss without mixup',
        term(),
        'SoftTargetCrossEntropy',
        'class numbers (B,)',
        'leave loss out',
        plain=model(loss=dict(type='SoftTargetCrossEntropy')),
    ),
    case(
        'loss with parameters',
        term(),
        'Linear has trainable parameters',
        'take a loss without',
        plain=model(loss=dict(type='Linear', in_features=4, out_features=4)),
    ),
    case(
        'JSD without its splits',
        term(),
        'JsdCrossEntropy',
        'AugMix',
        'leave loss out',
        plain=model(loss=dict(type='JsdCrossEntropy', num_splits=3)),
    ),
    case(
        'weights of other classes',
        term(),
        'CrossEntropyLoss',
        '4 classes',
        '[2]',
        plain=model(loss=dict(type='CrossEntropyLoss', weight=[1.0, 2.0])),
    ),
    # --- mixing and erasing
    case('nothing to mix', term(), 'model.mixup mixes nothing', 'mixup_alpha > 0', plain=model(mixup=dict())),
    case(
        'odd mode of mixup',
        term(),
        "'batch', 'pair', 'elem'",
        "'batchwise'",
        plain=model(mixup=dict(MIX, mode='batchwise')),
    ),
    case(
        'misspelt mixup',
        term(),
        "no option 'mix_up_alpha'",
        "did you mean 'mixup_alpha'",
        plain=model(mixup=dict(mix_up_alpha=0.8)),
    ),
    case('mixup is a number', term(), 'model.mixup must be dict(mixup_alpha=0.8)', 'got 0.8', plain=model(mixup=0.8)),
    case(
        'mixup alpha negative',
        term(),
        'model.mixup.mixup_alpha',
        '>= 0',
        '-1.0',
        plain=model(mixup=dict(mixup_alpha=-1.0)),
    ),
    case('mixup prob 2', term(), 'model.mixup.prob', 'from 0 to 1', '2.0', plain=model(mixup=dict(MIX, prob=2.0))),
    case(
        'cutmix_minmax reversed',
        term(),
        'cutmix_minmax',
        '(0.2, 0.8)',
        'got (0.8, 0.2)',
        plain=model(mixup=dict(cutmix_minmax=(0.8, 0.2))),
    ),
    case(
        'mixup in the transform',
        term(),
        "'mixup' cannot be used here",
        'belongs to the model: mixup=dict(',
        edit=transform(input_size=32, training=True, mixup=0.8),
    ),
    case(
        'num_classes of mixup',
        term(),
        "model.mixup has no option 'num_classes'",
        'choose from',
        plain=model(mixup=dict(MIX, num_classes=4)),
    ),
    case(
        'erasing in the transform',
        term(),
        "'re_prob'",
        'belongs to the model: random_erasing=dict(',
        edit=transform(input_size=32, training=True, re_prob=0.25),
    ),
    case(
        'RandomErasing in the transform',
        term(),
        "'RandomErasing'",
        'belongs to the model: random_erasing=dict(',
        plain=data(transform=[dict(type='RandomErasing')]),
    ),
    case(
        'erasing is a number',
        term(),
        'model.random_erasing must be dict(probability=0.25)',
        'got 0.25',
        plain=model(random_erasing=0.25),
    ),
    case(
        'erasing probability 25',
        term(),
        'model.random_erasing.probability',
        'from 0 to 1',
        '25',
        plain=model(random_erasing=dict(probability=25)),
    ),
    # --- transforms
    case(
        'ToTensor',
        term(),
        "'ToTensor' cannot be used here",
        'leave it out',
        plain=data(transform=[dict(type='ToTensor')]),
    ),
    case(
        'Normalize',
        term(),
        "'Normalize' cannot be used here",
        'the model normalises',
        plain=data(transform=[dict(type='Normalize', mean=[0, 0, 0], std=[1, 1, 1])]),
    ),
    case(
        'float pixels',
        term(),
        "'ToDtype' cannot be used here",
        'uint8',
        plain=data(transform=[dict(type='PILToTensor'), dict(type='ToDtype', dtype='float32')]),
    ),
    case(
        'unknown transform',
        term(),
        "no transform 'RandomHorizontalFlp'",
        "did you mean 'RandomHorizontalFlip'",
        plain=data(transform=[dict(type='RandomHorizontalFlp')]),
    ),
    case(
        'transform is a name',
        term(),
        "not 'RandomCrop'",
        'dict(input_size=32, training=True)',
        plain=data(transform='RandomCrop'),
    ),
    case(
        'crop larger than image',
        term(),
        '.png',
        '(32 x 32 pixels)',
        '(64, 64)',
        plain=data(transform=[dict(type='RandomCrop', size=64)]),
    ),
    # --- images
    case(
        'grey images',
        term(),
        '1 channels',
        'model takes 3',
        'in_chans=1 in the model',
        'in_chans=3 in the data set',
        plain=data(in_chans=1),
    ),
    case('grey model', term(), '3 channels', 'model takes 1', 'in_chans=3 in the model', plain=model(in_chans=1)),
    case(
        'truncated images',
        term(),
        '.png cannot be read',
        'truncated',
        "on_corrupt='skip'",
        edit=in_images('truncated', truncate),
    ),
    case(
        'texts with the name of an image',
        term(),
        '.png cannot be read',
        "on_corrupt='skip'",
        edit=in_images('text', text_files),
    ),
    case(
        'every image is broken',
        term(),
        'None of the 16 images',
        '/text/train',
        plain=data(on_corrupt='skip'),
        edit=in_images('text', text_files),
    ),
    case(
        'misspelt on_corrupt',
        term(),
        "on_corrupt cannot be 'skipp'",
        "did you mean 'skip'",
        plain=data(on_corrupt='skipp'),
    ),
    case(
        'no images',
        term(),
        '/train holds no images',
        'expected <class>/<name>',
        '.png',
        edit=in_images('empty', no_images),
    ),
    case(
        'unknown folder',
        term(),
        "no known class: 'circles'",
        "did you mean 'circle'",
        edit=in_images('folder', other_folder),
    ),
    case(
        'no such split', term(), 'split: there is no folder', 'trian', "did you mean 'train'", plain=data(split='trian')
    ),
    case('no split', term(), 'holds splits, not classes', "split='train'", plain=data(split=None)),
    case(
        'classes of a folder missing',
        term(),
        "no known class: 'square'",
        'the option classes',
        plain=data(classes=('bar', 'circle', 'cross')),
    ),
    case(
        'label out of range',
        term(),
        'classes has 4 names',
        'greatest label is 9',
        edit=arrays(labels=[0, 1, 2, 9] * 2, classes=CLASSES),
    ),
    case(
        'label out of range, no names',
        term(),
        'data set has 10 classes',
        'num_classes=4',
        edit=arrays(labels=[0, 1, 2, 9] * 2),
    ),
    # --- multi-label
    case(
        'vectors for a softmax',
        term(),
        'are vectors',
        'multi_label=False',
        'write multi_label=True',
        edit=arrays(classes=CLASSES),
    ),
    case(
        'classes for sigmoids',
        term('BinaryKLDivLoss'),
        'are class numbers',
        'multi_label=True',
        'write multi_label=False',
        plain=model(multi_label=True),
    ),
    case(
        'KLDivLoss of sigmoids',
        term(),
        'KLDivLoss does not suit',
        'a sigmoid each',
        "type='BinaryKLDivLoss'",
        plain=model(multi_label=True),
        edit=arrays(classes=CLASSES),
    ),
    case(
        'BinaryKLDivLoss of a softmax',
        term('BinaryKLDivLoss'),
        'BinaryKLDivLoss does not suit',
        'a softmax together',
        "type='KLDivLoss'",
    ),
    case(
        'DKD of sigmoids',
        term('DKDLoss'),
        'DKDLoss does not suit',
        'a sigmoid each',
        "type='BinaryKLDivLoss'",
        plain=model(multi_label=True),
        edit=arrays(classes=CLASSES),
    ),
    case(
        'cross entropy of sigmoids',
        term('BinaryKLDivLoss'),
        'LabelSmoothingCrossEntropy',
        'multi_label=True',
        'leave loss out',
        plain=model(multi_label=True, loss=dict(type='LabelSmoothingCrossEntropy')),
        edit=arrays(classes=CLASSES),
    ),
    # --- KD losses
    case(
        'YOLOLogitLoss', term('YOLOLogitLoss'), "student 'logits'", 'a classification head', 'compares detection heads'
    ),
    case('PixelwiseKLDivLoss', term('PixelwiseKLDivLoss'), 'a classification head', 'compares segmentation heads'),
    case('MaskKLDivLoss', term('MaskKLDivLoss'), "student 'logits'", 'compares instance segmentation heads'),
    case('ChannelWiseDivLoss of logits', term('ChannelWiseDivLoss'), '(B, C, H, W)', '(1, 4)', 'use KLDivLoss'),
    case('MGDLoss of logits', term('MGDLoss'), '(B, C, H, W)', '(1, 4)', form='model_form'),
    case(
        'KLDivLoss of a stage',
        term('KLDivLoss', 'stages[-1]', 'stages[-1]'),
        "'stages[-1]' has the map 32x4x4",
        'not the classes',
    ),
    case(
        'DKD of two classes',
        term('DKDLoss'),
        'With 2 classes',
        'KLDivLoss',
        'beta=0',
        teacher=of('resnet'),
        changes=dict(classes=('bar', 'circle', 'a', 'b')),
    ),
    case(
        'DISTLoss of one class',
        term('DISTLoss'),
        'at least 2 classes',
        'got 1',
        teacher=of('resnet'),
        changes=dict(classes=('bar', 'x', 'a', 'b')),
    ),
    case(
        'misspelt option of a KD loss',
        term(options=dict(temprature=4)),
        "(KLDivLoss) has no option 'temprature'",
        "did you mean 'temperature'",
    ),
    case('temperature 0', term(options=dict(temperature=0)), 'temperature', '> 0', 'got 0'),
    case('alpha above 1', term(), 'alpha must be a number in [0, 1]', '1.5', distill=dict(alpha=1.5)),
    case('alpha in the term', term(alpha=0.5), "no option 'alpha'", 'choose from'),
    case('an adapter for logits', term(adapter=dict(type='ConvAdapter')), 'take no adapter', 'remove it'),
    # --- teachers
    case(
        'unknown teacher of timm',
        term(),
        "timm has no model 'resnet_18'",
        "did you mean 'resnet18'",
        teacher=timm('resnet_18'),
    ),
    case(
        'a teacher of timm without weights',
        term(),
        "needs 'checkpoint'",
        'pretrained=True',
        'noise',
        teacher=lambda lab: dict(timm='resnet18'),
    ),
    case('weights twice', term(), "'checkpoint'", 'pretrained=True', 'not both', teacher=timm(pretrained=True)),
    case(
        'options beside the name',
        term(),
        "teacher has no option 'layers'",
        "'options'",
        teacher=lambda lab: {**timm()(lab), 'layers': (1, 1, 1, 1)},
    ),
    case(
        'options forgotten', term(), 'does not fit', '40 of 122 keys missing', 'teacher.timm', teacher=timm(options={})
    ),
    case(
        'misspelt option of a timm teacher',
        term(),
        "no option 'layer'",
        "did you mean 'layers'",
        teacher=timm(options=dict(RESNET, layer=3)),
    ),
    case(
        'timm and config',
        term(),
        "one model, got both 'config' and 'timm'",
        teacher=lambda lab: {**lab.teacher(), 'timm': 'resnet18'},
    ),
    case(
        'a name as teacher',
        term(),
        "got 'resnet18'",
        "dict(config='mmdet::...', checkpoint='x.pth')",
        edit=lambda lab, config: config.default_hooks.distill.update(teacher='resnet18'),
    ),
    case(
        'model= in the teacher',
        term(),
        "dict(config='mmdet::...', checkpoint='x.pth')",
        "got the keys ['checkpoint', 'model']",
        teacher=lambda lab: dict(model='resnet18', checkpoint=lab.teacher()['checkpoint']),
    ),
    case(
        'torchvision with timm name',
        term(),
        "torchvision has no classifier 'deit_tiny_patch16_224'",
        'choose from',
        teacher=lambda lab: dict(torchvision='deit_tiny_patch16_224', checkpoint=lab.teacher()['checkpoint']),
    ),
    case(
        'checkpoint missing',
        term(),
        "'/nowhere/x.pth' does not exist",
        "'/nowhere' does not exist either",
        changes=dict(checkpoint='/nowhere/x.pth'),
    ),
    case(
        'checkpoint beside',
        term(),
        '.pthx',
        'did you mean',
        '.pth',
        teacher=lambda lab: {**lab.teacher(), 'checkpoint': lab.teacher()['checkpoint'] + 'x'},
    ),
    case(
        'weights of another classifier',
        term(),
        'does not fit',
        'another architecture',
        'teacher.config',
        teacher=checkpoint_of('vit'),
    ),
    case(
        'weights for other classes',
        term(),
        'fc.weight is (7, 128) in the file and (4, 128)',
        'number of classes',
        teacher=checkpoint_of('resnet', classes=7),
    ),
    case(
        'damaged checkpoint',
        term(),
        'half.pth',
        'not a readable checkpoint',
        'truncated',
        teacher=file('half.pth', half),
    ),
    case(
        'a YOLO as checkpoint',
        term(),
        'yolo.pth',
        'a model of Ultralytics',
        "dict(ultralytics='<name>.pt')",
        teacher=file('yolo.pth', ultralytics('yolo11n-cls')),
    ),
    case(
        'a YOLO as timm checkpoint',
        term(),
        'yolo.pth',
        'a model of Ultralytics',
        "dict(ultralytics='<name>.pt')",
        teacher=file('yolo.pth', ultralytics('yolo11n-cls'), base=timm()),
    ),
    case(
        'a YOLO detector',
        term(),
        'a classification head, but this loss compares detection heads',
        teacher=file('yolo_det.pt', ultralytics('yolo11n'), 'ultralytics', base=None),
    ),
    case(
        'timm weights as ultralytics',
        term(),
        'is not a .pt file',
        teacher=lambda lab: dict(ultralytics=lab.teacher()['checkpoint']),
    ),
    case(
        'a detector by config',
        term(),
        'a classification head, but this loss compares detection heads',
        teacher=detector,
    ),
    case(
        'an exported pickle',
        term(),
        'pickle.pt2',
        'is a checkpoint, not an exported file',
        "dict(timm='...'",
        teacher=file('pickle.pt2', pickled, 'exported', base=None),
    ),
    case(
        'exported with checkpoint',
        term(),
        'teacher.checkpoint',
        'has its weights in it',
        'remove the option',
        teacher=lambda lab: dict(exported=lab.teacher()['checkpoint'], checkpoint='x.pth'),
    ),
    case(
        'NaN in the teacher',
        term(),
        'the teacher returns NaN',
        "'logits'",
        'checkpoint is damaged',
        teacher=file(
            'nan.pth',
            lambda p, lab: torch.save(
                {k: v * float('nan') for k, v in torch.load(lab.teacher()['checkpoint'])['state_dict'].items()}, p
            ),
        ),
    ),
    case('grey teacher', term(), '3 channels', 'takes 1', teacher=of('resnet', extra="model['in_chans'] = 1\n")),
    # --- what the student starts from
    case(
        'start missing',
        term(),
        "model.checkpoint '/nowhere/x.pth' does not exist",
        plain=model(checkpoint='/nowhere/x.pth'),
    ),
    case(
        'start of another classifier',
        term(),
        'model.checkpoint',
        'does not fit ResNet',
        'check model.model with its options',
        edit=starts_from(weights_of('vit')),
    ),
    case('start damaged', term(), 'model.checkpoint', 'not a readable checkpoint', edit=starts_from(half)),
    case(
        'start from a YOLO', term(), 'start.pth', 'a model of Ultralytics', edit=starts_from(ultralytics('yolo11n-cls'))
    ),
    case('start pickled', term(), 'start.pth', 'pickled object', 'model.state_dict()', edit=starts_from(pickled)),
    case(
        'load_from of another',
        term(),
        'does not fit resnet18 at all',
        'cls_token',
        'check load_from',
        edit=lambda lab, config: config.update(load_from=lab.teacher('vit')['checkpoint']),
    ),
]


# ---------------------------------------------------------------------- the runs
@pytest.fixture(scope='module')
def odd_lab(tmp_path_factory):
    return OddLab(tmp_path_factory.mktemp('odd_lab'))


class Begun(Hook):
    """How many iterations have begun, and how many have come to their end."""

    priority = 'HIGHEST'
    batches = done = 0

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.batches += 1

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.done += 1


def hashes(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob('*.pth')}


def check(message, says):
    missing = [word for word in says if word not in message]
    assert not missing, f'{missing} not in: {message}'
    # The lines to write are lines.
    assert 'Traceback' not in message and len(message) < 720
    assert '\n' not in message or 'Write in your config' in message


@pytest.mark.parametrize('case', CASES, ids=lambda c: c.name.replace(' ', '_'))
def test_refused_before_anything_is_trained(odd_lab, case):
    config, begun = case.config(odd_lab), Begun()
    before = hashes(odd_lab.root)
    with pytest.raises(DistillError) as caught:
        odd_lab.train(config, begun)
    check(str(caught.value), case.says)
    # Also what only images and labels show: the check before the first iteration is given some of the run.
    assert begun.done == begun.batches == 0
    assert hashes(odd_lab.root) == before


def test_the_table_is_complete():
    names = {c.name for c in CASES}
    assert len(names) == len(CASES) >= 150


# ---------------------------------------------------------------------- the command line
COMMANDS = {
    'a token for a ResNet': (
        '--kd deit_token {weights}',
        "student 'dist_logits'",
        'no distillation token',
        'deit_tiny',
    ),
    'nonsense of timm': ('--kd kl --teacher timm::nonsense --teacher-checkpoint x', "timm has no model 'nonsense'"),
    'near miss of timm': ('--kd kl --teacher timm::resnet_18 --teacher-checkpoint x', "did you mean 'resnet18'"),
    'near miss of torchvision': (
        '--kd kl --teacher torchvision::resnet19 --teacher-checkpoint x',
        "no classifier 'resnet19'; did you mean 'resnet18'",
    ),
    'timm without weights': ('--kd kl --teacher timm::resnet18', '--teacher-checkpoint is missing'),
    'a bare name': ('--kd kl --teacher resnet18 --teacher-checkpoint x', "'resnet18' is no file", 'timm::resnet18'),
    'no such export': ('--kd kl --teacher x.pt2', "teacher.exported 'x.pt2' does not exist"),
    'a recipe of detectors': ('--kd yolo_logit {weights}', 'is for detection, not for classification', "'deit_hard'"),
    'a recipe of segmentors': ('--kd pixel_kl {weights}', 'is for segmentation, not for classification', "'kl'"),
    'misspelt recipe': ('--kd deit_tokn {weights}', "'deit_tokn'", "did you mean 'deit_token'"),
    'misspelt data set': (
        '--cfg-options train_dataloader.dataset.type=kd_plugins.ImageFoldr',
        "train_dataloader.dataset: there is no type 'kd_plugins.ImageFoldr'; did you mean 'kd_plugins.ImageFolder'",
    ),
    'misspelt model': (
        '--cfg-options model.type=kd_plugins.TimClassifier',
        "model: there is no type 'kd_plugins.TimClassifier'; did you mean 'kd_plugins.TimmClassifier'",
    ),
    'option of another data set': (
        '--cfg-options train_dataloader.dataset.pipeline=none',
        "train_dataloader.dataset (kd_plugins.ImageFolder) has no option 'pipeline'",
        "'transform'",
    ),
    'misspelt option of a metric': (
        '--cfg-options val_evaluator.top_k=5',
        "Accuracy has no option 'top_k': did you mean 'topk'",
    ),
}


def run(argv):
    """What the command line ends with."""
    with pytest.raises(SystemExit) as caught:
        main(['train', *argv])
    return caught.value.code


@pytest.mark.parametrize('name', COMMANDS)
def test_the_command_line_ends_with_one_sentence(odd_lab, name):
    line, *says = COMMANDS[name]
    teacher = odd_lab.teacher()
    weights = f'--teacher {teacher["config"]} --teacher-checkpoint {teacher["checkpoint"]}'
    message = run([odd_lab.dump(odd_lab.plain(val=True)), *line.format(weights=weights).split()])
    assert message.startswith('error: ') and '\n' not in message
    check(message, says)


def test_a_forgotten_option_is_named(odd_lab):
    config = odd_lab.plain()
    del config.train_dataloader.dataset['root']
    assert run([odd_lab.dump(config)]) == "error: train_dataloader.dataset (kd_plugins.ImageFolder) needs 'root'."


def test_the_command_ends_with_one_line(odd_lab):
    """As a process: what the user sees last, and the exit code."""
    teacher = odd_lab.teacher()
    argv = [odd_lab.dump(odd_lab.plain()), '--kd', 'deit_token']
    argv += ['--teacher', teacher['config'], '--teacher-checkpoint', teacher['checkpoint']]
    done = odd_lab.run('tools/train.py', *argv, check=False)
    assert done.returncode == 1 and 'Traceback' not in done.stdout
    assert (
        done.stdout.strip().splitlines()[-1].startswith("error: term 'token': student 'dist_logits': resnet18 has no")
    )


# ---------------------------------------------------------------------- students of another kind
@pytest.mark.parametrize(
    ('teacher', 'value', 'says'),
    [
        (timm(), term(), ("teacher 'logits'", 'a classification head, but this loss compares detection heads')),
        (
            ClsLab.teacher,
            term('YOLOLogitLoss', 'bbox_head', 'bbox_head'),
            ("teacher 'bbox_head'", "a classifier are 'logits'"),
        ),
        (
            ClsLab.teacher,
            term('BinaryKLDivLoss', 'bbox_head', 'logits'),
            ("teacher 'logits'", 'a classification head, but this loss compares detection heads', 'tap features'),
        ),
    ],
    ids=['of timm', 'tapped as a detector', 'logits for boxes'],
)
def test_a_classifier_does_not_teach_a_detector(odd_lab, teacher, value, says):
    from kd_plugins.mm.host import MMHost
    from kd_plugins.teachers import PixelFormat
    from kd_plugins.teachers.run import RunOptions, load_teachers, open_session
    from tests.integration.synthetic import build, yolox

    student, given = build(yolox(3)), teacher(odd_lab)
    host = MMHost(student)
    options = RunOptions.read(dict(teacher=given, terms=dict(cls=value)))
    teachers, _ = load_teachers(options.teachers, student, host, PixelFormat())
    with pytest.raises(DistillError) as caught:
        open_session(student, teachers, options, host).check_heads()
    check(str(caught.value), says)


# ---------------------------------------------------------------------- validation
def validate(lab, edit):
    config = lab.plain(val=True)
    edit(config)
    with pytest.raises(DistillError) as caught:
        lab.runner(config).val()
    return str(caught.value)


def test_validation_images_of_another_size(odd_lab):
    def larger(config):
        config.val_dataloader.dataset.transform = [dict(type='Resize', size=40)]

    check(validate(odd_lab, larger), ('/val/', 'is 40x40 but the model takes 32x32', 'write input_size=32'))


def test_a_metric_for_other_labels(odd_lab):
    def several(config):
        config.model.multi_label = True
        config.val_dataloader.dataset = odd_lab.arrays(classes=CLASSES)

    def one(config):
        config.val_evaluator = dict(type='kd_plugins.MultiLabelAP')

    check(validate(odd_lab, several), ('Accuracy', 'images.npy[0]', 'several labels', 'kd_plugins.MultiLabelAP'))
    check(validate(odd_lab, one), ('MultiLabelAP', '.png', 'one class', 'kd_plugins.Accuracy'))


# ---------------------------------------------------------------------- what looks wrong and is not
def trained(lab, config):
    probe = Probe()
    lab.train(config, probe)
    assert all(np.isfinite(log['loss']) for log in probe.logs)
    return probe.logs


def test_some_broken_images_are_skipped_when_that_is_asked_for(odd_lab):
    def break_one(folder):
        (folder / 'train' / 'bar' / '0.png').write_text('no image')
        path = folder / 'train' / 'cross' / '1.png'
        path.write_bytes(path.read_bytes()[:300])

    options = dict(root=odd_lab.images('some', break_one), on_corrupt='skip')
    config = odd_lab.hook_form(odd_lab.plain(**data(**options)), odd_lab.teacher())
    assert len(trained(odd_lab, config)) == 4


@pytest.mark.parametrize('mixup', [None, MIX], ids=['plain', 'mixup'])
def test_batches_of_one_image(odd_lab, mixup):
    config = odd_lab.plain('deit', train_dataloader__batch_size=1, **model(mixup=mixup))
    logs = trained(odd_lab, odd_lab.hook_form(config, odd_lab.teacher(), dict(token=term('KLDivLoss', 'dist_logits'))))
    assert len(logs) == 16 and all(log['loss_kd_token'] > 0 for log in logs)


def test_a_last_batch_of_one_image(odd_lab):
    """16 images, five at a time: the last batch has one, and Mixup no partner for it."""
    config = odd_lab.plain(train_dataloader__batch_size=5, **model(mixup=MIX))
    assert len(trained(odd_lab, odd_lab.hook_form(config, odd_lab.teacher()))) == 4


def test_a_token_learns_from_a_teachers_token(odd_lab):
    value = term('HardLabelLoss', 'dist_logits', 'dist_logits')
    config = odd_lab.hook_form(odd_lab.plain('deit'), odd_lab.teacher('deit'), dict(token=value))
    assert all(log['loss_kd_token'] > 0 for log in trained(odd_lab, config))


def test_classes_have_weights(odd_lab):
    """As a list, which is all that a config can hold."""
    weighted = dict(type='CrossEntropyLoss', weight=[1.0, 2.0, 1.0, 1.0])
    config = odd_lab.hook_form(odd_lab.plain(**model(loss=weighted)), odd_lab.teacher())
    assert len(trained(odd_lab, config)) == 4
