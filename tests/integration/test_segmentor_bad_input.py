"""Wrong input around segmentors is refused before the first iteration, in words that say what to write instead."""

import hashlib
from dataclasses import dataclass
from typing import Any

import pytest
from mmengine.hooks import Hook

from kd_plugins.cli import main
from kd_plugins.config_files import resolve_config
from kd_plugins.errors import DistillError
from tests.integration.seg_lab import CLASSES, SegLab

_INPUT = "data_preprocessor=dict(size=None, size_divisor=32), test_cfg=dict(mode='whole')"
_BN = "norm_cfg=dict(type='BN')"
_RESNET = f'backbone=dict(depth=18, base_channels={{w}}, stem_channels={{w}}, {_BN}, init_cfg=None)'
_CHANNELS = '[{w}, {w} * 2, {w} * 4, {w} * 8]'
_FFN = 'ffn_cfg=dict(embed_dims=32, feedforward_channels=32)'
_ATTENTION = 'dict(embed_dims=32, num_heads=4)'


class OddLab(SegLab):
    """Also segmentors whose last stage has no class logits per pixel, or that take one image size only."""

    MODELS = {
        **SegLab.MODELS,
        'mask2former': (
            resolve_config('mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py'),
            f"""model = dict({_INPUT}, {_RESNET}, decode_head=dict(
    in_channels={_CHANNELS}, feat_channels=32, out_channels=32, num_classes={{classes}}, num_queries=5,
    positional_encoding=dict(num_feats=16), loss_cls=dict(class_weight=[1.0] * {{classes}} + [0.1]),
    pixel_decoder=dict(
        positional_encoding=dict(num_feats=16),
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg={_ATTENTION}, {_FFN}))),
    transformer_decoder=dict(
        num_layers=1, layer_cfg=dict(self_attn_cfg={_ATTENTION}, cross_attn_cfg={_ATTENTION}, {_FFN})),
    train_cfg=dict(num_points=16)))
""",
        ),
        'pointrend': (
            resolve_config('mmseg::point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py'),
            f"""stage = dict(num_classes={{classes}}, dropout_ratio=0.1, align_corners=False)
model = dict(
    {_INPUT}, pretrained=None, {_RESNET}, neck=dict(in_channels={_CHANNELS}, out_channels=16),
    train_cfg=dict(num_points=16), decode_head=[
        dict(type='FPNHead', in_channels=[16] * 4, in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32], channels=16,
             {_BN}, **stage),
        dict(type='PointHead', in_channels=[16], in_index=[0], channels=16, num_fcs=1, **stage)])
del stage
""",
        ),
        'depth': (
            resolve_config('mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py'),
            f"""model = dict(
    {_INPUT}, pretrained=None, type='DepthEstimator', {_RESNET}, auxiliary_head=None, decode_head=dict(
        _delete_=True, type='VPDDepthHead', max_depth=10.0, in_channels={_CHANNELS}, embed_dim=16, feature_dim=16,
        num_deconv_layers=1, num_deconv_filters=(16,)))
""",
        ),
        'encnet': (
            resolve_config('mmseg::encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
            f"""model = dict(
    {_INPUT}, pretrained=None, {_RESNET},
    auxiliary_head=dict(in_channels={{w}} * 4, channels=8, num_classes={{classes}}, {_BN}), decode_head=dict(
        in_channels=[{{w}} * 2, {{w}} * 4, {{w}} * 8], channels=16, num_codes=4, num_classes={{classes}}, {_BN}))
""",
        ),
        # Its relative positions are those of 64x64 pixels.
        'beit': (
            resolve_config('mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py'),
            f"""model = dict(
    pretrained=None, data_preprocessor=dict(size=(64, 64)), test_cfg=dict(_delete_=True, mode='whole'),
    backbone=dict(img_size=(64, 64), embed_dims=16, num_layers=4, num_heads=2, out_indices=(0, 1, 2, 3)),
    neck=dict(embed_dim=16), decode_head=dict(in_channels=[16] * 4, channels={{w}}, num_classes={{classes}}, {_BN}),
    auxiliary_head=dict(in_channels=16, channels=8, num_classes={{classes}}, {_BN}))
""",
        ),
    }


SIGMOID = "\nmodel['decode_head']['loss_decode'] = dict(type='CrossEntropyLoss', use_sigmoid=True)\n"
BINARY = SIGMOID + "model['decode_head'].update(out_channels=1, num_classes=2)\n"
TWO_HEADS = f"""
side = dict(type='FCNHead', in_channels=16, in_index=2, channels=8, num_classes=4, num_convs=1, {_BN})
model['auxiliary_head'] = [side, side]
del side
"""
NAMELESS = '\ntrain_dataloader = dict(dataset=dict(metainfo=None))\n'
FOUR_CHANNELS = "\nmodel['backbone']['in_channels'] = 4\n"


# ---------------------------------------------------------------------- what a case is made of
def term(loss='PixelwiseKLDivLoss', student='decode_head', teacher='decode_head', *, options=None, **more):
    return dict(loss=dict(type=loss, **(options or {})), student=student, teacher=teacher, **more)


def features(student='backbone', teacher='backbone', loss='FeatureMSELoss', **more):
    return term(loss, student, teacher, **more)


def options(**values):
    return term(options=values)


@dataclass(frozen=True)
class Case:
    """A student's family and options, its teacher's, a term, and the words that the error must contain."""

    name: str
    term: dict
    says: tuple
    student: str = 'fcn'
    plain: tuple = ()  # more options of `SegLab.plain`
    teacher: Any = ('fcn', ())  # family and more options of `SegLab.teacher`, or a function of the lab
    changes: tuple = ()  # of the mapping `teacher`
    distill: tuple = ()  # more options of `distill`
    form: str = 'hook_form'

    def config(self, lab):
        teacher = self.teacher(lab) if callable(self.teacher) else lab.teacher(self.teacher[0], **dict(self.teacher[1]))
        plain = lab.plain(self.student, **dict(self.plain))
        return getattr(lab, self.form)(
            plain, {**teacher, **dict(self.changes)}, dict(seg=self.term), **dict(self.distill)
        )


def case(name, value, *says, **more):
    more = {k: tuple(v.items()) if isinstance(v, dict) else v for k, v in more.items()}
    return Case(name, value, says, **more)


def of(family, **more):
    return family, tuple(more.items())


def checkpoint_of(family, **more):
    """The config of the usual teacher with the weights of another."""

    def build(lab):
        return {**lab.teacher(), 'checkpoint': lab.teacher(family, **more)['checkpoint']}

    return build


def ultralytics(kind):
    """A network of Ultralytics with this data set's classes."""

    def build(lab):
        from ultralytics import YOLO
        from ultralytics.nn.tasks import yaml_model_load
        from ultralytics.utils import YAML

        path = lab.root / f'{kind}_of_lab.yaml'
        YAML.save(path, {**yaml_model_load(f'{kind}.yaml'), 'nc': len(CLASSES)})
        model = YOLO(str(path))
        model.model.names = dict(enumerate(CLASSES))
        model.save(path.with_suffix('.pt'))
        return dict(ultralytics=str(path.with_suffix('.pt')))

    return build


STAGE = 'backbone.layers.0.1.0'  # of SegFormer: tokens
VECTOR = 'decode_head.enc_module.fc.0'  # of EncNet

CASES = [
    # --- heads without class logits per pixel
    case(
        'Mask2Former teaches',
        term(),
        "teacher 'decode_head'",
        'Mask2FormerHead',
        'backbone',
        'UPerHead',
        teacher=of('mask2former'),
    ),
    case(
        'Mask2Former learns', term(), "student 'decode_head'", 'Mask2FormerHead', 'set of masks', student='mask2former'
    ),
    case(
        'channels of Mask2Former',
        term('ChannelWiseDivLoss'),
        'teacher: decode_head (Mask2FormerHead)',
        'features alone',
        'tap backbone or neck',
        teacher=of('mask2former'),
    ),
    case("PointRend's last stage", term(), "student 'decode_head'", 'PointHead', 'decode_head.0', student='pointrend'),
    case(
        "channels of PointRend's last stage",
        term('ChannelWiseDivLoss'),
        'decode_head.1 (PointHead)',
        'features alone',
        student='pointrend',
    ),
    case(
        'depth teaches',
        term(),
        "teacher 'decode_head'",
        'VPDDepthHead',
        'depth, not classes',
        'FeatureMSELoss',
        teacher=of('depth'),
    ),
    # --- taps
    case(
        'no auxiliary head',
        term(student='auxiliary_head'),
        "no module 'auxiliary_head'",
        "children 'data_preprocessor', 'backbone', 'decode_head'",
        student='segformer',
    ),
    case(
        'several auxiliary heads',
        term(student='auxiliary_head'),
        "'auxiliary_head' is a list of 2 modules",
        "'auxiliary_head.0'",
        plain=dict(extra=TWO_HEADS),
    ),
    case(
        'an auxiliary head by index',
        term(student='auxiliary_head[1]'),
        "'auxiliary_head.1' instead of 'auxiliary_head[1]'",
        plain=dict(extra=TWO_HEADS),
    ),
    case('one output of a whole head', term(student='decode_head[1]'), "write 'decode_head'", 'decode_head[1]'),
    # Silently, it would be the first output of the last stage.
    case(
        'a stage of a cascade by index',
        term('ChannelWiseDivLoss', 'decode_head[0]'),
        "'decode_head' is a list of 2 modules",
        "'decode_head.0' instead of 'decode_head[0]'",
        student='ocr',
    ),
    case('no such stage', term(student='decode_head.2'), "'decode_head.2'", "children '0', '1'", student='ocr'),
    case(
        'stages of a backbone',
        features('backbone.layers'),
        "'backbone.layers' is a list of 4",
        "'backbone.layers.0'",
        student='segformer',
    ),
    case(
        'logits of a feature map',
        features('backbone[0]', 'backbone[0]', 'KLDivLoss'),
        "'backbone[0]' has the map 4x",
        'ChannelWiseDivLoss',
    ),
    case(
        'pixels of a backbone',
        features(loss='PixelwiseKLDivLoss'),
        "student 'backbone'",
        'ResNetV1c',
        'Supported heads: ',
    ),
    case(
        'a frozen tap',
        features('backbone[1]', 'backbone[1]', 'AttentionTransferLoss'),
        "'backbone[1]' carries no gradient",
        'tap a trainable module',
        plain=dict(model__backbone__frozen_stages=4),
        distill=dict(start=3),
    ),
    # --- losses
    case('labels for DKD', term('DKDLoss'), 'DKDLoss', 'which pixels to ignore', 'PixelwiseKLDivLoss'),
    case('a loss of detectors', term('YOLOLogitLoss'), 'FCNHead', 'a segmentation head', 'compares detection heads'),
    case('a loss of instances', term('MaskKLDivLoss'), 'it is a segmentation head', 'instance segmentation heads'),
    case(
        'KLDivLoss of sigmoids',
        term('KLDivLoss'),
        'KLDivLoss',
        'a sigmoid each',
        'PixelwiseKLDivLoss',
        'sigmoid=True',
        plain=dict(extra=SIGMOID),
        teacher=of('fcn', extra=SIGMOID),
    ),
    case(
        'BinaryKLDivLoss of a softmax',
        term('BinaryKLDivLoss'),
        'BinaryKLDivLoss',
        'a softmax together',
        "PixelwiseKLDivLoss', sigmoid=False",
    ),
    case(
        'sigmoid=False of sigmoids',
        term(),
        'PixelwiseKLDivLoss does not suit these heads',
        'a sigmoid each',
        "type='PixelwiseKLDivLoss', sigmoid=True",
        plain=dict(extra=SIGMOID),
        teacher=of('fcn', extra=SIGMOID),
    ),
    case('sigmoid=True of a softmax', options(sigmoid=True), 'does not suit', 'a softmax together', 'sigmoid=False'),
    case(
        'sigmoids learn from a softmax',
        term(),
        'are a sigmoid',
        "the teacher's a softmax",
        'same kind of loss',
        plain=dict(extra=SIGMOID),
    ),
    case(
        'a vector for a loss on maps',
        features(VECTOR, VECTOR, 'ChannelWiseDivLoss'),
        '(B, C, H, W)',
        '(1, 16)',
        'KLDivLoss',
        student='encnet',
        plain=dict(width=16),
        teacher=of('encnet'),
    ),
    case(
        'a vector and a map',
        features(VECTOR, 'backbone[0]'),
        VECTOR,
        'has no positions',
        'before the pooling',
        student='encnet',
        teacher=of('encnet'),
    ),
    # --- classes
    case(
        'counts differ, names unknown',
        term(),
        'student has 4 classes and the teacher 7',
        'classes=[...] in teacher',
        teacher=of('fcn', classes=7, extra=NAMELESS),
    ),
    case(
        'no class in common',
        term(),
        "'ground', 'circle'",
        "'class0', 'class1'",
        'no class in common',
        'classes=[...]',
        teacher=of('fcn', classes=7),
    ),
    case(
        'names for another head',
        term(),
        'teacher.classes has 2 names',
        'predicts 4 classes',
        changes=dict(classes=('ground', 'bar')),
    ),
    case(
        'a binary teacher',
        term(),
        'student has 4 classes and the teacher 2',
        'classes=[...]',
        teacher=of('fcn', extra=BINARY),
    ),
    # --- numbers
    case('alpha above 1', options(alpha=1.5), 'alpha', '[0, 1]', '1.5'),
    case('alpha is a text', options(alpha='x'), 'alpha', "'x'", 'number'),
    case('alpha with sigmoids', options(alpha=0.5, sigmoid=True), 'alpha=0.5', 'sigmoid=True', 'leave alpha=None'),
    case('balance above 1', term(), 'alpha must be a number in [0, 1]', '1.5', distill=dict(alpha=1.5)),
    case('temperature 0', options(temperature=0), 'temperature', '> 0', 'got 0'),
    case('ignore_index is a name', options(ignore_index='void'), 'ignore_index must be an integer', "'void'"),
    case(
        'everything is masked',
        features(loss='MGDLoss', options=dict(mask_ratio=1.0)),
        'mask_ratio must be below 1',
        '1.0',
        form='model_form',
    ),
    case('start after max_iters', term(), 'start=4', '4 iterations', 'never run', distill=dict(start=4)),
    # --- the teacher's resolution
    case('no pixels', term(), 'teacher.input_size', '(0, 5)', '(512, 1024)', changes=dict(input_size=(0, 5))),
    case('negative scale', term(), 'teacher.input_scale', '-1', '1/16 to 16', changes=dict(input_scale=-1)),
    case(
        'a scale that leaves one pixel',
        term(),
        'teacher.input_scale',
        '0.001',
        '1/16 to 16',
        changes=dict(input_scale=0.001),
    ),
    case(
        'size and scale',
        term(),
        'input_size and teacher.input_scale',
        'give one',
        changes=dict(input_size=64, input_scale=2.0),
    ),
    case(
        'a student of four channels',
        term(),
        'student (EncoderDecoder)',
        '3 channel(s)',
        'to have 4 channels',
        plain=dict(extra=FOUR_CHANNELS),
    ),
    # --- adapters
    case(
        'misspelt option',
        features(adapter=dict(type='auto', nrom=True)),
        "'nrom'",
        "did you mean 'norm'",
        form='model_form',
    ),
    case(
        'negative tokens',
        features(adapter=dict(type='auto', prefix_tokens=-1)),
        'prefix_tokens',
        '-1',
        'whole number',
        form='model_form',
    ),
    case(
        'a name in a list',
        features(adapter=[dict(type='ResizeAdapter'), 'ConvAdapter']),
        "'ConvAdapter'",
        'dict(type=...)',
        form='model_form',
    ),
    case(
        'an adapter for logits',
        term(adapter=dict(type='ResizeAdapter')),
        'whole segmentation heads',
        'take no adapter',
        'remove it',
    ),
    case(
        'an adapter of other channels',
        term('ChannelWiseDivLoss', adapter=dict(type='ConvAdapter', in_channels=3, out_channels=4)),
        'its adapter or ChannelWiseDivLoss fails',
        'decode_head (4x8x8)',
        'expected input',
        'correct their options',
        form='model_form',
    ),
    case(
        'tokens without a grid',
        features(STAGE, 'backbone[0]', adapter=dict(type='auto', prefix_tokens=3)),
        repr(STAGE),
        '256 tokens',
        'behind 3',
        'prefix_tokens=0',
        student='segformer',
        form='model_form',
    ),
    # --- other teachers
    case(
        'weights of another segmentor',
        term(),
        'does not fit EncoderDecoder',
        'psp_modules',
        'teacher.config',
        teacher=checkpoint_of('pspnet'),
    ),
    case(
        'weights for other classes',
        term(),
        'conv_seg.weight is (7, 16, 1, 1) in the file',
        'number of classes',
        teacher=checkpoint_of('fcn', classes=7),
    ),
    case(
        'a detector of Ultralytics',
        term(),
        "no module 'decode_head'",
        "DetectionModel has no module 'decode_head'",
        teacher=ultralytics('yolo11n'),
    ),
    case(
        "a detector's head",
        term(teacher='bbox_head'),
        "teacher 'bbox_head'",
        'Detect',
        'a detection head',
        'compares segmentation heads',
        teacher=ultralytics('yolo11n'),
    ),
    case(
        'a classifier of Ultralytics',
        term(),
        'ClassificationModel',
        "has no module 'decode_head'",
        teacher=ultralytics('yolo11n-cls'),
    ),
]


# ---------------------------------------------------------------------- the runs
@pytest.fixture(scope='module')
def odd_lab(tmp_path_factory):
    return OddLab(tmp_path_factory.mktemp('odd_lab'))


class Begun(Hook):
    """Whether a run has come to its first batch."""

    priority = 'HIGHEST'
    batches = 0

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.batches += 1


def hashes(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob('*.pth')}


@pytest.mark.parametrize('case', CASES, ids=lambda c: c.name.replace(' ', '_'))
def test_refused_before_the_first_iteration(odd_lab, case):
    config, begun = case.config(odd_lab), Begun()
    before = hashes(odd_lab.root)
    with pytest.raises(DistillError) as caught:
        odd_lab.train(config, begun)
    message = str(caught.value)
    missing = [word for word in case.says if word not in message]
    assert not missing, f'{missing} not in: {message}'
    # The lines to write are lines.
    assert (
        'Traceback' not in message and len(message) < 700 and ('\n' not in message or 'Write in your config' in message)
    )
    assert begun.batches == 0
    assert hashes(odd_lab.root) == before


def test_the_table_is_complete():
    assert len({c.name for c in CASES}) == len(CASES) >= 50


@pytest.mark.parametrize(
    'name', ['Mask2Former teaches', 'a stage of a cascade by index', 'an adapter of other channels']
)
def test_the_command_line_ends_with_one_sentence(odd_lab, name):
    """Also where the form is chosen by building the adapters."""
    (case,) = [c for c in CASES if c.name == name]
    recipe = odd_lab.root / f'recipe_{CASES.index(case)}.py'
    recipe.write_text(f'terms = dict(seg={case.term!r})\n')
    teacher = odd_lab.teacher(case.teacher[0], **dict(case.teacher[1]))
    argv = [odd_lab.dump(odd_lab.plain(case.student, **dict(case.plain))), '--kd', str(recipe)]
    argv += ['--teacher', teacher['config'], '--teacher-checkpoint', teacher['checkpoint']]
    with pytest.raises(SystemExit) as caught:
        main(['train', *argv])
    message = caught.value.code
    assert message.startswith('error: ') and '\n' not in message
    assert all(word in message for word in case.says), message


# ---------------------------------------------------------------------- what looks wrong and is not
@pytest.mark.parametrize(
    ('student', 'teacher', 'value'),
    [
        ('pointrend', 'pointrend', term(student='decode_head.0', teacher='decode_head.0')),
        ('beit', 'fcn', term()),
        ('fcn', 'beit', term()),
        ('encnet', 'fcn', term()),
        ('mask2former', 'fcn', features('backbone[0]', 'backbone[0]', 'AttentionTransferLoss')),
    ],
    ids=['stage before points', 'student of one size', 'teacher of one size', 'EncNet', 'features of Mask2Former'],
)
def test_what_can_be_distilled_is(odd_lab, student, teacher, value):
    from tests.integration.lab import Probe

    size = dict(input_size=64) if teacher == 'beit' else {}
    probe = Probe()
    config = odd_lab.hook_form(odd_lab.plain(student, steps=2), {**odd_lab.teacher(teacher), **size}, dict(seg=value))
    odd_lab.train(config, probe)
    assert [log['loss_kd_seg'] > 0 for log in probe.logs] == [True, True]
