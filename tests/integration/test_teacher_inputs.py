"""Promise 19: a teacher with its own preprocessing sees what its own preprocessor would show it."""

import copy

import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData

from kd_plugins.mm.inputs import TeacherInputs
from tests.integration.lab import FEATURES, Config, Probe, distill_hook

IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
CAFFE = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0])
PREPROCESSORS = {
    'none': dict(pad_value=114.0),
    'ImageNet RGB': dict(**IMAGENET, bgr_to_rgb=True),
    'Caffe BGR': CAFFE,
    'RTMDet': dict(mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395], pad_value=7.0),
    'pixels / 255, RGB': dict(mean=[0.0] * 3, std=[255.0] * 3, bgr_to_rgb=True),
}
# Re-normalising is one multiplication and one addition in float32: relative to the largest value.
TOLERANCE = 1e-6
SHAPES = [(64, 96), (50, 70), (96, 33), (96, 96)]  # images of one batch: padded right, below, both, not at all


def batch(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in shapes]
    samples = []
    for h, w in shapes:
        sample = DetDataSample(metainfo=dict(img_shape=(h, w), ori_shape=(h, w), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=HorizontalBoxes(torch.tensor([[4.0, 4.0, 20.0, 20.0]])))
        samples.append(sample)
    return dict(inputs=images, data_samples=samples)


def preprocessor(name, **options):
    return DetDataPreprocessor(**PREPROCESSORS[name], pad_size_divisor=32, **options)


@pytest.mark.parametrize('teacher', PREPROCESSORS)
@pytest.mark.parametrize('student', PREPROCESSORS)
def test_every_pair_of_preprocessors(student, teacher):
    ours, theirs = preprocessor(student), preprocessor(teacher)
    expected = theirs(batch(), training=True)['inputs']
    processed = ours(batch(), training=True)
    untouched = processed['inputs'].clone()
    made = TeacherInputs(ours, theirs)(processed['inputs'], processed['data_samples'])
    assert made.shape == expected.shape
    assert (made - expected).abs().max() <= TOLERANCE * max(expected.abs().max().item(), 255 / min(theirs_std(theirs)))
    assert torch.equal(processed['inputs'], untouched), "the student's batch was written to"
    assert (made is processed['inputs']) == (student == teacher)


def theirs_std(module):
    return module.std.flatten().tolist() if hasattr(module, 'std') and module._enable_normalize else [1.0]


@pytest.mark.parametrize('augmentation', ['BatchSyncRandomResize', 'BatchFixedSizePad'])
def test_batch_augmentations_of_the_student_are_kept(augmentation):
    """The teacher sees the augmented batch. Resizing mixes the last pixels of an image with the padding around it, in
    each network's own pad value: those are left out."""
    augments = {
        'BatchSyncRandomResize': dict(
            type='mmdet.BatchSyncRandomResize', random_size_range=(128, 160), size_divisor=32, interval=1
        ),
        'BatchFixedSizePad': dict(type='mmdet.BatchFixedSizePad', size=(128, 160), img_pad_value=0, pad_mask=False),
    }[augmentation]
    # The random resize asks the running Runner for its iteration.
    MessageHub.get_current_instance().update_info('iter', 0)
    results = []
    for name in ('RTMDet', 'ImageNet RGB'):
        module = preprocessor(name, batch_augments=[copy.deepcopy(augments)])
        for augment in module.batch_augments:
            if augmentation == 'BatchSyncRandomResize':
                augment._input_size = (128, 160)
            else:
                augment.img_pad_value = module.pad_value
        results.append((module, module(batch(), training=True)))
    (ours, processed), (theirs, expected) = results
    assert processed['inputs'].shape[-2:] == (128, 160)
    made = TeacherInputs(ours, theirs)(processed['inputs'], processed['data_samples'])
    for image, wanted, sample in zip(made, expected['inputs'], processed['data_samples'], strict=True):
        h, w = sample.img_shape
        inside = (slice(None), slice(0, h - 2), slice(0, w - 2))
        assert (image[inside] - wanted[inside]).abs().max() <= 2e-5
        for outside in ((slice(None), slice(h + 2, None)), (slice(None), slice(None), slice(w + 2, None))):
            assert image[outside].eq(0).all() and wanted[outside].eq(0).all()


OTHER = """
model['data_preprocessor'].update(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_value=5.0)
"""


def test_teacher_outputs_in_a_run_are_those_on_the_raw_images(lab):
    """In a real run (YOLOX: raw BGR, padded with 114; teacher: ImageNet RGB, padded with 5) on batches of different
    shapes: the teacher's features equal those of its own preprocessor and network, within float32 (1e-4 relative)."""
    teacher = lab.teacher(extra=OTHER)
    config = lab.model_form(lab.plain(), teacher, dict(features=FEATURES))
    alone = lab.build(Config.fromfile(teacher['config']))
    alone.load_state_dict(torch.load(teacher['checkpoint'])['state_dict'])
    alone.eval()
    checked, raw = [], {}

    class Compare(Probe):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            raw.update(copy.deepcopy(data_batch))
            distiller = distill_hook(runner).session
            if not checked:
                inner = distiller._run_teacher

                def recorded(*args):
                    checked.append(inner(*args))
                    return checked[-1]

                distiller._run_teacher = recorded

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            with torch.no_grad():
                wanted = alone.neck(alone.backbone(alone.data_preprocessor(copy.deepcopy(raw), True)['inputs']))
            (call,) = checked[-1].calls['neck']
            assert len(call.output) == len(wanted) == 3
            for made, right in zip(call.output, wanted, strict=True):
                assert (made - right).abs().max() <= 1e-4 * right.abs().max()

    runner = lab.runner(config, Compare())
    runner.train()
    assert len(checked) == 4
    assert 'pad 5' in distill_hook(runner).session.teacher.normalization


def test_the_dry_run_is_no_noise_that_a_trained_detector_never_saw(lab):
    """White noise made a trained YOLOX predict sizes of e^248 strides, and a good teacher was refused for them."""
    runner = lab.runner(lab.hook_form(lab.plain(), lab.teacher()))
    seen = []
    handle = runner.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    runner.train()
    handle.remove()
    image = seen[0]
    assert image.shape[-2:] == (256, 256), 'the first forward is the dry run'
    assert abs(image.mean() - 114) < 1 and image.max() - image.min() <= 20 and image.std() > 1
