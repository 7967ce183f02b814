"""``kd-plugins recipes MODEL``: what fits is found by the checks of a run, in every zoo."""

import argparse
from pathlib import Path

import pytest

pytest.importorskip('mmseg')
pytest.importorskip('ultralytics')

from kd_plugins.distiller.schedules import build_schedule
from kd_plugins.errors import DistillError
from kd_plugins.lab.fitting import mm, yolo
from kd_plugins.lab.fitting.command import main, report
from kd_plugins.lab.fitting.starter import first_that_fits
from kd_plugins.lab.fitting.trial import Trial, others, try_recipe, try_recipes, weights_text

#: Transformer features and a head without a neck in between, as in SegFormer.
SEGMENTOR = """
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder', data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
    backbone=dict(type='MixVisionTransformer', embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]),
    decode_head=dict(type='SegformerHead', in_channels=[8, 8, 8, 8], in_index=[0, 1, 2, 3], channels=8, num_classes=3,
                     norm_cfg=dict(type='BN'), loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
"""
TWO_STAGES = """
default_scope = 'mmdet'
_base_ = __import__('kd_plugins').config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
model = dict(
    backbone=dict(depth=18, base_channels=4), neck=dict(in_channels=[4, 8, 16, 32], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=8), bbox_head=dict(in_channels=8, fc_out_channels=8)))
"""


def run(path, capsys, *words):
    main([str(path), *words])
    return capsys.readouterr().out


def test_a_segmentor_without_a_neck(tmp_path, capsys):
    (tmp_path / 'segmentor.py').write_text(SEGMENTOR)
    text = run(tmp_path / 'segmentor.py', capsys)
    fits, _, other = text.partition('For ')
    fits = ' '.join(fits.split())  # wrapped or not: width of the terminal
    assert 'fits: 10 of 10 recipes' in fits and 'backbone 10 (3.3 to 30)' in fits and 'logits 3 (1 to 9)' in fits
    assert 'arXiv 1903.04197' in fits and 'random weights' not in fits and 'one like the student' in fits
    assert 'yolo_logit' in other and max(map(len, text.splitlines())) <= 100


def test_a_head_that_cannot_be_read_leaves_its_features(tmp_path):
    (tmp_path / 'two.py').write_text(TWO_STAGES)
    pair = mm.open_pair(str(tmp_path / 'two.py'), str(tmp_path / 'two.py'), None, tmp_path)
    assert pair.notes == ['no --teacher-checkpoint: tried with random weights']
    trials = try_recipes(pair)
    fitting = {t.recipe for t in trials if t.fits}
    assert fitting == {'cosine', 'cwd', 'cwd_norm', 'feature', 'mgd', 'pkd'}
    assert [t.fits for t in trials] == sorted((t.fits for t in trials), reverse=True)
    reason = next(t.reason for t in trials if t.recipe == 'yolo_logit')
    assert 'distil the neck instead, e.g. --kd pkd' in reason and len(reason) < 400 and '\n' not in reason
    assert reason.split()[0] in report(pair, trials)


def test_a_starter_takes_the_first_that_fits(tmp_path, capsys):
    (tmp_path / 'two.py').write_text(TWO_STAGES)
    args = argparse.Namespace(teacher=str(tmp_path / 'two.py'), teacher_checkpoint=None)
    written = []

    def text(recipe, file):
        written.append(file)
        return TWO_STAGES

    assert first_that_fits(text, ('yolo_logit', 'pkd', 'cwd'), args) == 'pkd'
    notes = capsys.readouterr().out
    assert notes.count('note: ') == 1 and notes.startswith('note: yolo_logit does not fit: ')
    with pytest.raises(DistillError, match=r'yolo_logit does not fit: .*distil the neck instead') as error:
        first_that_fits(text, ('yolo_logit',), args)
    assert len(str(error.value)) < 400 and not any(Path(file).exists() for file in written)


def test_models_of_ultralytics(tmp_path):
    pair = yolo.open_pair('yolo11n.yaml', 'yolov8n.yaml', None, tmp_path)
    assert pair.notes == ['--teacher has no weights: tried with random ones']
    assert try_recipe(pair, 'pkd') == Trial('pkd', 'neck 10 (3.3 to 30)')
    assert try_recipe(pair, 'localization').fits
    assert 'is for classification' in try_recipe(pair, 'kl').reason
    with pytest.raises(DistillError, match='belongs to the config of a teacher'):
        yolo.open_pair('yolo11n.yaml', 'yolov8n.yaml', 'x.pth', tmp_path)
    with pytest.raises(DistillError, match='cannot be built'):
        yolo.open_pair('yolo11q.yaml', None, None, tmp_path)


def test_weights():
    ramp = build_schedule(dict(type='linear', start=0.0, end=1.0), 'weight')
    weights = dict(a=build_schedule(3, 'weight'), b=ramp)
    assert weights_text(weights, 0.9) == 'a 3 (1 to 9), b 0 -> 1 (linear, 0 to 1 of the run), alpha 0.9'
    assert (
        others('segmentation')['classification'][0] == 'annealing' and 'cwd_norm' in others('segmentation')['detection']
    )


def test_recipes_and_models_are_told_apart(tmp_path, capsys):
    assert 'arXiv 2207.02039' in run('pkd', capsys)
    (tmp_path / 'own.yaml').write_text('terms: {}\n')
    assert run(tmp_path / 'own.yaml', capsys) == 'terms: {}\n'
    for words, message in ((['pkdd'], "did you mean 'pkd'"), (['x.py'], "config 'x.py' does not exist")):
        with pytest.raises(DistillError, match=message):
            main(words)
    with pytest.raises(DistillError, match='--teacher needs a student'):
        main(['--teacher', 'x.py'])
