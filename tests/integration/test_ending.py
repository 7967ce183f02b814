"""What real runs leave: the plain student as files, the block of the end, and nothing in a plain run's log."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from kd_plugins.errors import DistillError
from kd_plugins.mm import cli
from tests.integration.cls_lab import LOGITS
from tests.integration.lab import FEATURES

KEEP_BEST = dict(val=True, train_cfg__val_interval=1, default_hooks__checkpoint__save_best='auto')


def left_by(runner):
    """Where the run's files are: the student's weights and config, and what the block of the end says."""
    folder = Path(runner.work_dir)
    block = json.loads((Path(runner.log_dir) / 'kd_summary.json').read_text())
    return folder / 'kd_student.pth', folder / 'kd_student.py', block


def weights_of(path):
    # As timm and every careful loader read it.
    return torch.load(path, weights_only=True)['state_dict']


def assert_equal(found, expected):
    assert list(found) == list(expected)
    assert all(torch.equal(v, expected[k]) for k, v in found.items())


@pytest.fixture(scope='module')
def detected(lab):
    """A distilled run with adapters."""
    return lab.train(lab.hook_form(lab.plain(val=True), lab.teacher(), dict(neck=FEATURES)))


def test_a_detector_opens_in_mmdet(lab, detected):
    from mmdet.apis import init_detector

    weights, file, block = left_by(detected)
    assert weights_of(weights).keys() == lab.build(lab.plain()).state_dict().keys()
    saved = torch.load(weights.with_name('epoch_1.pth'), weights_only=False)
    assert_equal(weights_of(weights), saved['state_dict'])
    content = torch.load(weights, weights_only=True)
    assert set(content) == {'meta', 'state_dict'}
    for text in (content['meta']['cfg'], file.read_text()):
        assert 'kd_plugins' not in text, 'the student needs this package'
    model = init_detector(str(file), str(weights), device='cpu')
    assert type(model) is type(lab.build(lab.plain())) and model.dataset_meta['classes'] == lab.CLASSES
    assert block['student']['path'].endswith('kd_student.pth') and block['student']['source'].startswith('last')
    assert all(share > 0 for share in block['kd_ratio'].values()) and block['seconds'] > 0
    assert {'test', 'use', 'export'} == set(block['student']['commands'])
    text = Path(detected.log_dir, 'kd_summary.txt').read_text()
    assert text.index('Knowledge distillation is ON') < text.index('Knowledge distillation is DONE')


def test_the_summary_is_the_last_word_before_the_first_iteration(detected):
    (log,) = Path(detected.log_dir).glob('*.log')
    after = log.read_text().partition('Knowledge distillation is ON')[2].splitlines()
    assert 'Epoch(train) [1][1/4]' in next(line for line in after if ' - mmengine - ' in line)


def test_the_model_form_leaves_the_plain_class(lab):
    _, file, _ = left_by(lab.train(lab.model_form(lab.plain(), lab.teacher())))
    assert 'kd_plugins' not in file.read_text() and Config.fromfile(file).model.type == 'YOLOX'


def test_a_segmentor_opens_in_mmseg(seg_lab):
    from mmseg.apis import init_model

    runner = seg_lab.train(seg_lab.hook_form(seg_lab.plain(val=True, train_cfg__val_interval=2), seg_lab.teacher()))
    weights, file, block = left_by(runner)
    model = init_model(str(file), str(weights), device='cpu')
    assert tuple(model.dataset_meta['classes']) == tuple(seg_lab.CLASSES)
    assert block['metric'] == 'mIoU' and block['unit'] == 'iteration' and block['best']['at'] in (2, 4)
    assert 'kd_plugins' not in file.read_text()


@pytest.fixture(scope='module')
def classified(cls_lab):
    """A distilled run that keeps the best."""
    return cls_lab.train(cls_lab.hook_form(cls_lab.plain(**KEEP_BEST), cls_lab.teacher()))


def test_a_classifier_opens_in_timm(cls_lab, classified):
    import timm

    weights, _, block = left_by(classified)
    (best,) = Path(classified.work_dir).glob('best_*.pth')
    assert_equal(weights_of(weights), torch.load(best, weights_only=False)['state_dict'])
    assert block['metric'] == 'accuracy/top1' and block['best']['at'] == 1
    assert block['student']['source'] == 'best checkpoint, epoch 1' and not block['notes']
    call = block['student']['commands']['use'].partition('model = ')[2].rstrip('"')
    model = eval(call, {'timm': timm})
    assert_equal(model.state_dict(), weights_of(weights))
    assert tuple(torch.load(weights, weights_only=True)['meta']['dataset_meta']['classes']) == cls_lab.CLASSES


def test_a_run_without_checkpoints_leaves_no_student(cls_lab):
    config = cls_lab.plain(default_hooks__checkpoint__save_last=False)
    weights, file, block = left_by(cls_lab.train(cls_lab.hook_form(config, cls_lab.teacher())))
    assert not weights.exists() and not file.exists()
    assert block['student'] is None and 'no checkpoint' in block['notes'][0]


def test_a_student_that_cannot_be_written_does_not_end_the_run(cls_lab, monkeypatch):
    def full(*given):
        raise OSError('No space left on device')

    monkeypatch.setattr('kd_plugins.mm.hook.write_student', full)
    runner = cls_lab.train(cls_lab.hook_form(cls_lab.plain(), cls_lab.teacher()))
    _, _, block = left_by(runner)
    assert block['student'] is None and 'No space left' in block['notes'][0]


# ---------------------------------------------------------------------- undistilled by mistake
def resumed(lab, detected, monkeypatch, *options):
    """`kd-plugins train PLAIN --resume CHECKPOINT`, and the runner."""
    runners = []
    build = cli._runner
    monkeypatch.setattr(cli, '_runner', lambda config: runners.append(build(config)) or runners[-1])
    config = lab.plain(train_cfg__max_epochs=2)
    command = [lab.dump(config), '--resume', str(Path(detected.work_dir, 'epoch_1.pth'))]
    cli.train([*command, *(['--cfg-options', *options] if options else ())])
    return runners[-1]


def test_resuming_without_kd_stops(lab, detected, monkeypatch):
    with pytest.raises(
        DistillError, match=r'of a distilled run.*default_hooks\.distill=None to go on without'
    ) as error:
        resumed(lab, detected, monkeypatch)
    assert 'resume it with the config in its folder' in str(error.value)


def test_resuming_without_kd_on_purpose_forgets_its_losses(lab, detected, monkeypatch):
    runner = resumed(lab, detected, monkeypatch, 'default_hooks.distill=None')
    assert runner.epoch == 2 and 'train/loss_bbox' in runner.message_hub.log_scalars
    assert not [k for k in runner.message_hub.log_scalars if 'kd' in k]
    saved = torch.load(Path(runner.work_dir, 'epoch_2.pth'), weights_only=False)
    assert 'DistillHook' not in saved['message_hub']['runtime_info']['cfg']


def test_a_term_of_another_name_leaves_no_loss_behind(cls_lab, classified):
    config = cls_lab.hook_form(cls_lab.plain(train_cfg__max_epochs=2), cls_lab.teacher(), dict(other=LOGITS))
    config.load_from, config.resume = str(Path(classified.work_dir, 'epoch_1.pth')), True
    runner = cls_lab.train(config)
    logged = [k for k in runner.message_hub.log_scalars if 'kd' in k]
    assert logged == ['train/kd_ratio', 'train/loss_kd_other']
    assert 'resumed' in left_by(runner)[2]['notes'][-1]
